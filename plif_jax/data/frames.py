"""Events to frames, as the paper integrates them.

Events are (t, x, y, p) in order of time; a frame counts, per pixel and polarity, the events of one slice of them.
"""

from collections.abc import Mapping

import numba
import numpy as np

from plif_jax.errors import UserError, first_line

SPLIT_BY = ("number", "time")
NORMALIZATIONS = (None, "frequency", "max", "norm", "sum")

LARGEST = 2**62  # of a number whose difference to another is to be right
BEYOND = "times are microseconds and coordinates pixels, none beyond 2**62."
EPS = 1e-5  # the authors' lower bound for a divisor: an empty frame stays zero


def integrate(events, height, width, T, split_by="number", normalization=None):
    """Integrates events into T frames of counts, normalised on request.

    With N events and j = 0 .. T-1, frame j takes the events [l_j, r_j):

        number: l_j = j (N // T),               r_j = l_{j+1}, the last r = N
        time:   t - t_0 in [j dt, (j+1) dt),    dt = (t_{N-1} - t_0) // T, the last frame takes the rest

    so fewer than T events, or a recording shorter than T microseconds, leave all but the last frame empty.
    Normalisation, of a frame F or of one of its channels F_p (E and Var over its pixels, eps = 1e-5):

        frequency: F / max(duration, 1 us); by time the duration is dt, the last frame's dt + (t_{N-1} - t_0) mod T;
                   by number it lasts until the next frame's first event, the last frame until its last event
        max:       F_p / max(max F_p, eps)
        norm:      (F_p - E F_p) / sqrt(max(Var F_p, eps))
        sum:       F_p / max(sum F_p, eps)

    This is the authors' program, finite where theirs fails: frequency by number, frames without events, sensors that
    are not square.

    Args:
      events: structured array or mapping with integer t [N] (microseconds, not decreasing), x [N] in 0 .. width-1,
        y [N] in 0 .. height-1, p [N].
      height, width: the sensor's size in pixels.
      T: number of frames.
      split_by: "number" or "time".
      normalization: None, "frequency" (events per microsecond), "max", "norm" or "sum".

    Returns:
      [T, height, width, 2] indexed [t, y, x, p]: int32 counts, float64 where normalised. Channel 0 counts the events
      with p = 0, channel 1 all others.

    Raises:
      UserError: a sensor without pixels, or frames that fit no memory; no events, columns that are missing, masked,
        differ in length or are no whole numbers, times that decrease, coordinates outside the sensor, T < 1, or an
        unknown name.

    Reference: Fang et al., ICCV 2021, https://arxiv.org/abs/2007.05785, Eq. 18 of the supplement, for counts by number;
    slices of time and normalisations are those of the paper's program.
    """
    check_settings(T, split_by, normalization)
    if not all(isinstance(side, int | np.integer) and side >= 1 for side in (height, width)):
        raise UserError(f"a sensor of {height} x {width} pixels: height and width are whole numbers from 1.")
    if int(T) * int(height) * int(width) >= 2**48:  # more than a machine could address
        raise UserError(f"{T} frames of {height} x {width} pixels fit no memory: give a smaller T or sensor.")
    t_N, x_N, y_N, p_N = (integers(name, _column(events, name)) for name in "txyp")
    if t_N.dtype != np.int64:  # a difference may be larger than a smaller type holds
        t_N = t_N.astype(np.int64)
    if len(t_N) == 0:
        raise UserError("there are no events: frames need at least one.")
    if not len(t_N) == len(x_N) == len(y_N) == len(p_N):
        raise UserError(f"columns t, x, y, p differ: {len(t_N)}, {len(x_N)}, {len(y_N)} and {len(p_N)} values.")
    if split_by == "time" or normalization == "frequency":
        for t in (t_N[0], t_N[-1]):  # a difference of larger ones would not be right
            if not -LARGEST <= t <= LARGEST:
                raise UserError(f"an event at {t} us: {BEYOND}")
    edges = _edges_by_number(len(t_N), T) if split_by == "number" else _edges_by_time(t_N, T)
    counts = _count(t_N, x_N, y_N, p_N, edges, height, width)
    if normalization is None:
        return counts
    if normalization == "frequency":
        durations = _durations(t_N, edges, T, split_by)
        return counts / np.maximum(durations, 1)[:, None, None, None]
    return _normalize(counts, normalization)


def check_settings(T, split_by, normalization):
    """Raises UserError unless `integrate` can work with these settings."""
    if not isinstance(T, int | np.integer) or isinstance(T, bool) or T < 1:
        raise UserError(f"T is {T}, but events need at least 1 frame: give a whole number T >= 1.")
    for flag, value, allowed in (
        ("split_by", split_by, SPLIT_BY),
        ("normalization", normalization, NORMALIZATIONS),
    ):
        if value not in allowed:
            raise UserError(f"{flag} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def _column(events, name):
    try:
        return events[name]
    except (KeyError, IndexError, TypeError, ValueError):
        there = getattr(getattr(events, "dtype", None), "names", None) or (
            list(events) if isinstance(events, Mapping) else f"{type(events).__name__} without names"
        )
        raise UserError(f"events have columns t, x, y and p; {name} is missing in {there}.") from None


def integers(name, column):
    """A column as signed integers of this machine's byte order; booleans, which only tell polarity, as they are."""
    if np.ma.is_masked(column):
        raise UserError(f"column {name} is masked in places: give the events that count alone.")
    try:
        column = np.asarray(column)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths; a file that is closed
        raise UserError(f"column {name} is no array that NumPy takes: {first_line(error)}.") from None
    if column.ndim != 1:
        raise UserError(f"column {name} has shape {list(column.shape)}: give one number for each event.")
    if column.dtype.kind in "ib" and column.dtype.isnative:
        return column
    if column.dtype.kind not in "biuf":
        raise UserError(f"column {name} holds {column.dtype}: times and coordinates are whole numbers.")
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        raise UserError(f"column {name} holds NaN or infinity: times and coordinates are whole numbers.")
    if column.dtype.kind == "f" and not (column == np.trunc(column)).all():
        raise UserError(f"column {name} holds fractions: times are whole microseconds, coordinates whole pixels.")
    if name != "p" and len(column) and not -LARGEST <= int(column.min()) <= int(column.max()) <= LARGEST:
        raise UserError(f"column {name} goes from {column.min()} to {column.max()}: {BEYOND}")
    return column.astype(np.int64)


def _count(t_N, x_N, y_N, p_N, edges, height, width):
    """Counts the events between each two edges [T, height, width, 2], and checks them on the way."""
    counts_THWC = np.empty((len(edges) - 1, height, width, 2), np.int32)
    i = _count_events(t_N, x_N, y_N, p_N, edges, counts_THWC)
    if i < 0:
        return counts_THWC
    if i and t_N[i] < t_N[i - 1]:
        raise UserError(f"events are out of order: event {i} at {t_N[i]} us follows one at {t_N[i - 1]} us.")
    name, value, size = ("y", y_N[i], height) if 0 <= x_N[i] < width else ("x", x_N[i], width)
    raise UserError(f"event {i} at {name} = {value} lies outside the sensor: {name} is 0 to {size - 1} there.")


@numba.njit
def _count_events(t_N, x_N, y_N, p_N, edges, counts_THWC):
    """Fills in the counts; returns the first event that is out of order or outside the sensor, -1 if none is.

    Unsigned, a negative coordinate is a large one, and an index needs no look at its sign: twice as fast.
    """
    T, H, W, _ = counts_THWC.shape
    height, width = np.uint64(H), np.uint64(W)
    for j in range(T):
        frame = counts_THWC[j].reshape(-1)
        frame[:] = 0  # one by one: a frame stays in the cache until it is counted
        before = t_N[max(edges[j] - 1, 0)]
        for i in range(np.uint64(edges[j]), np.uint64(edges[j + 1])):
            t, x, y = t_N[i], np.uint64(x_N[i]), np.uint64(y_N[i])
            if t < before or x >= width or y >= height:
                return np.int64(i)
            before = t
            frame[np.uint64(2) * (y * width + x) + np.uint64(p_N[i] != 0)] += 1
    return -1


def _edges_by_number(N, T):
    """Returns the T + 1 event indices between which the frames lie, with equally many events each."""
    edges = np.arange(T + 1) * (N // T)
    edges[-1] = N
    return edges


def _edges_by_time(t_N, T):
    """Returns the T + 1 event indices between which the frames lie, with equal durations."""
    dt = (t_N[-1] - t_N[0]) // T
    inner = np.searchsorted(t_N, t_N[0] + dt * np.arange(1, T))
    return np.concatenate([[0], inner, [len(t_N)]])


def _durations(t_N, edges, T, split_by):
    """Returns each frame's duration [T] in microseconds."""
    if split_by == "number":
        return np.diff(t_N[np.minimum(edges, len(t_N) - 1)])
    duration = t_N[-1] - t_N[0]
    durations = np.full(T, duration // T)
    durations[-1] += duration % T
    return durations


def _normalize(counts_THWC, normalization):
    """Normalises every frame and polarity over its own pixels."""
    pixels = (1, 2)
    if normalization == "max":
        return counts_THWC / np.maximum(counts_THWC.max(pixels, keepdims=True), EPS)
    if normalization == "sum":
        return counts_THWC / np.maximum(counts_THWC.sum(pixels, keepdims=True), EPS)
    mean = counts_THWC.mean(pixels, keepdims=True)
    return (counts_THWC - mean) / np.sqrt(np.maximum(counts_THWC.var(pixels, keepdims=True), EPS))
