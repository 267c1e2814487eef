"""Frames against the authors' own numbers, against a plain loop, and at the edges where theirs fails."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference import cases

from plif_jax.data import frames
from plif_jax.errors import UserError

REFERENCE = np.load(Path(__file__).parent / "reference" / "frames.npz")
SPECS = json.loads(str(REFERENCE["spec"]))


def plain_loop(events, height, width, T, split_by, normalization):
    """The definition, event by event and frame by frame."""
    t, x, y, p = (np.asarray(events[k]).astype(int) for k in "txyp")
    N, out = len(t), np.zeros((T, height, width, 2))
    duration = t[-1] - t[0]
    if split_by == "number":
        frame_of = [min(i // (N // T), T - 1) if N >= T else T - 1 for i in range(N)]
    else:
        dt = duration // T
        frame_of = [min((t[i] - t[0]) // dt, T - 1) if dt else T - 1 for i in range(N)]
    for i, j in enumerate(frame_of):
        out[j, y[i], x[i], 0 if p[i] == 0 else 1] += 1
    for j in range(T):
        mine = [i for i in range(N) if frame_of[i] == j]
        if normalization == "frequency" and mine:
            if split_by == "number":
                seconds = t[min(mine[-1] + 1, N - 1)] - t[mine[0]]
            else:
                seconds = duration // T + (duration % T if j == T - 1 else 0)
            out[j] /= max(seconds, 1)
        for c in range(2):
            f = out[j, :, :, c]
            if normalization == "max":
                f /= max(f.max(), 1e-5)
            elif normalization == "sum":
                f /= max(f.sum(), 1e-5)
            elif normalization == "norm":
                f[...] = (f - f.mean()) / np.sqrt(max(f.var(), 1e-5))
    return out


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s['split_by']}-{s['normalization']}")
def test_the_authors_frames(spec):
    events = cases.events(spec["seed"], spec["n"], spec["size"], spec["size"], spec["duration"])
    got = frames.integrate(events, spec["size"], spec["size"], spec["frames"], spec["split_by"], spec["normalization"])
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), REFERENCE[f"{spec['index']}_frames"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("split_by", frames.SPLIT_BY)
@pytest.mark.parametrize("normalization", frames.NORMALIZATIONS)
@pytest.mark.parametrize("N, T, duration", [(1003, 7, 50_000), (60, 20, 900), (5, 8, 3), (1, 3, 10), (40, 6, 1)])
def test_against_a_plain_loop_on_an_oblong_sensor(split_by, normalization, N, T, duration):
    events = cases.events(11, N, 9, 13, duration)
    got = frames.integrate(events, 9, 13, T, split_by, normalization)
    assert got.shape == (T, 9, 13, 2)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, plain_loop(events, 9, 13, T, split_by, normalization), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_a_span_that_the_times_own_type_does_not_hold(dtype):
    t = np.linspace(np.iinfo(dtype).min, np.iinfo(dtype).max, 8).astype(dtype)
    for settings in ({"split_by": "time"}, {"split_by": "number", "normalization": "frequency"}):
        narrow, wide = (
            frames.integrate(dict(t=t, x=x, y=x, p=x), 1, 1, 4, **settings)
            for t, x in ((t, np.zeros(8, int)), (t.astype(np.int64), np.zeros(8, int)))
        )
        np.testing.assert_array_equal(narrow, wide)
        assert (narrow.sum((1, 2, 3)) > 0).all()


def test_empty_time_bins_leave_empty_frames_and_lose_nothing():
    events = {"t": [0, 1, 2, 99, 1007], "x": [0, 0, 0, 1, 2], "y": [0] * 5, "p": [0, 1, 2, 0, 1]}
    got = frames.integrate(events, 2, 3, T=10, split_by="time")
    assert got.sum((1, 2, 3)).tolist() == [4, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert got[0, 0, 0].tolist() == [1, 2], "polarity 0 in channel 0, all others in channel 1"


@pytest.mark.parametrize(
    "x, p, t", [("u1", "?", "u4"), ("<i2", "i1", "<i8"), (">i2", "u1", ">i4")], ids=["unsigned", "signed", "big-endian"]
)
def test_a_packed_structured_array_of_any_integers(x, p, t):
    plain = cases.events(3, 500, 100, 200, 9000)
    packed = np.empty(500, [("x", x), ("y", x), ("p", p), ("t", t)])
    for name in "txyp":
        packed[name] = plain[name]
    for split_by in frames.SPLIT_BY:
        np.testing.assert_array_equal(
            frames.integrate(packed, 100, 200, 5, split_by), frames.integrate(plain, 100, 200, 5, split_by)
        )


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": [0, 40]}, "event 1 at x = 40 lies outside the sensor: x is 0 to 31"),
        ({"y": [24, 0]}, "event 0 at y = 24 lies outside the sensor: y is 0 to 23"),
        ({"y": [0, -1]}, "event 1 at y = -1 lies outside"),
        ({"t": [9, 8]}, "out of order: event 1 at 8 us follows one at 9 us"),
        ({"t": [], "x": [], "y": [], "p": []}, "no events"),
        ({"t": [0.5, 0.7]}, "column t holds fractions: times are whole microseconds"),
        ({"t": [1.0, np.inf]}, "column t holds NaN or infinity: times and coordinates are whole"),
        ({"x": [0.5, np.nan]}, "column x holds NaN or infinity"),
        ({"t": ["1", "2"]}, "column t holds <U1"),
        ({"t": [[8], [9]]}, r"column t has shape \[2, 1\]: give one number for each event"),
        (
            {"t": np.array([0, 2**63], np.uint64)},
            r"column t goes from 0 to 9223372036854775808: .* none beyond 2\*\*62",
        ),
        ({"t": [1e30, 1e30]}, r"column t goes from 1e\+30 to 1e\+30"),
        ({"x": [0]}, "columns t, x, y, p differ: 2, 1, 2 and 2 values"),
        ({"x": [[0], [0, 1]]}, "column x is no array that NumPy takes: "),
        ({"t": np.ma.array([8, 9], mask=[0, 1])}, "column t is masked in places: give the events that count"),
    ],
)
def test_bad_events_are_named(change, says):
    events = {"t": [8, 9], "x": [0, 1], "y": [0, 1], "p": [0, 1]} | change
    for T in (2, 4):  # a frame for each event, or both in the last one
        with pytest.raises(UserError, match=says):
            frames.integrate(events, 24, 32, T)


@pytest.mark.parametrize("split_by, normalization", [("time", None), ("number", "frequency"), ("time", "frequency")])
@pytest.mark.parametrize("t", [[-(2**63), 0], [0, 2**63 - 1]])
def test_times_whose_difference_no_integer_holds_are_named(t, split_by, normalization):
    with pytest.raises(UserError, match=r"an event at -?922\d+ us: times are microseconds .* none beyond 2\*\*62"):
        frames.integrate({"t": t, "x": [0, 1], "y": [0, 1], "p": [0, 1]}, 24, 32, 2, split_by, normalization)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ({"t": [1], "x": [0], "y": [0]}, r"columns t, x, y and p; p is missing in \['t', 'x', 'y'\]"),
        (np.zeros(1, [("t", "i8"), ("x", "i2"), ("y", "i2")]), r"p is missing in \('t', 'x', 'y'\)"),
        (np.zeros((3, 4)), "t is missing in ndarray without names"),
    ],
)
def test_missing_columns_are_named(events, says):
    with pytest.raises(UserError, match=says):
        frames.integrate(events, 24, 32, 2)


@pytest.mark.parametrize("height", [0, 34.0])
def test_a_sensor_has_pixels(height):
    with pytest.raises(UserError, match=f"a sensor of {height} x 32 pixels: height and width are whole numbers from 1"):
        frames.integrate({"t": [1], "x": [0], "y": [0], "p": [0]}, height, 32, 2)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"T": 0}, "T is 0"),
        ({"T": True}, "T is True, .*give a whole number"),
        ({"T": 2.0}, "T is 2.0, .*give a whole number"),
        ({"T": 2**62}, r"4611686018427387904 frames of \d+ x \d+ pixels fit no memory"),
        ({"T": 2, "split_by": "size"}, "split_by is 'size'; allowed are 'number', 'time'"),
        ({"T": 2, "normalization": "mean"}, "allowed are None, 'frequency', 'max', 'norm', 'sum'"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        frames.integrate({"t": [1], "x": [0], "y": [0], "p": [0]}, 2, 2, **settings)


def test_polarities_beyond_signed_numbers_are_on():
    events = {"t": np.array([1]), "x": np.array([0]), "y": np.array([0]), "p": np.array([2**63], np.uint64)}
    assert frames.integrate(events, 1, 1, 1).ravel().tolist() == [0, 1]
