"""One part of a prepared set: what is written of its recordings, and what tells it from another."""

import os

import numpy as np
import pytest

from plif_jax.data import event_cache
from plif_jax.data.event_readers import EVENTS
from plif_jax.data.recordings import Recording


def test_counts_are_as_wide_as_the_largest_of_a_part_asks(tmp_path, monkeypatch):
    counts = {"a": 70_000, "b": 300}
    monkeypatch.setattr(event_cache.event_readers, "read_once", lambda path: np.zeros(counts[path], EVENTS))
    settings = {"T": 1, "split_by": "number", "normalization": None, "sensor": [1, 1]}
    event_cache.make_part(
        {"path": str(tmp_path / "part.npy"), "recordings": [Recording(name, 0) for name in counts], **settings}
    )
    assert np.load(tmp_path / "part.npy")[:, 0, 0, 0, 0].tolist() == [70_000, 300]


def test_an_event_where_one_cut_ends_and_the_next_begins_is_in_one_of_them(monkeypatch):
    events = np.zeros(3, EVENTS)
    events["t"] = 0, 10, 20
    monkeypatch.setattr(event_cache.event_readers, "read_once", lambda path: events)
    cuts = [Recording("a", 0, *cut) for cut in ((0, 10), (10, 20))]
    assert [event_cache.integrate(cut, (1, 1), 1).sum() for cut in cuts] == [1, 1]


def test_a_part_that_is_too_short_is_not_taken_for_made(tmp_path):
    np.save(tmp_path / "part.npy", np.zeros((1, 1)))
    assert not event_cache._is_made({"path": tmp_path / "part.npy", "recordings": [1, 2]})
    assert event_cache._is_made({"path": tmp_path / "part.npy", "recordings": [1]})


@pytest.mark.parametrize("other", [(0, 11), (1, 10), ()])
def test_a_digest_is_of_the_cuts_too(other):
    def digest(*cut):
        return event_cache._digest([Recording("a", 0, *cut)], lambda path: [path])

    assert digest(0, 10) == digest(0, 10) != digest(*other)


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path):
    told = []
    for digit in "01":
        (tmp_path / digit).mkdir()
        (tmp_path / digit / "1.bin").write_bytes(bytes(5))
        os.utime(tmp_path / digit / "1.bin", (0, 0))
        told.append(event_cache._stat(tmp_path / digit / "1.bin"))
    assert told[0] != told[1]
