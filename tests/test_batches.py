"""Batches: pure functions of (seed, epoch, step), the same from device memory and from disk."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from plif_jax.config import Config, UserError
from plif_jax.data import batches
from plif_jax.data.dataset import Dataset, Split
from plif_jax.training import loop


def split_of(n, classes=10):
    x = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    return Split(x, (np.arange(n) * 7 % classes).astype(np.int32), n)


def samples(n):
    return batches.Samples(split_of(n), np.arange(n))


def test_an_epoch_shows_every_sample_once_but_for_the_partial_batch():
    index = batches.training_batches(7, 0, samples(50), 16)
    assert index.shape == (3, 16) and len(np.unique(index)) == 48


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    orders = [batches.training_batches(seed, epoch, samples(64), 16) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert not any((a == b).all() for a, b in zip(orders, orders[1:] + orders[:1], strict=True))
    assert (orders[1] == batches.training_batches(1, 1, samples(64), 16)).all()


def test_evaluation_pads_and_counts_every_sample_once():
    index = batches.evaluation_batches(samples(21), 8)
    assert index.shape == (3, 8) and sorted(index[index >= 0]) == list(range(21))


@pytest.mark.parametrize("n, calls, K", [(21, 1, 3), (256, 1, 32), (264, 2, 17)])
def test_calls_of_many_batches_are_alike_and_hardly_padded(n, calls, K):
    """On an accelerator; 32 batches of 8 at most are evaluated in one call."""
    config, part = Config(dataset_name="CIFAR10", batch_size=2, steps_per_call=32), samples(n)
    feed = SimpleNamespace(chunks=lambda index, sizes: [(part,) for part in np.split(index, np.cumsum(sizes)[:-1])])
    seen = [index for (index,) in loop.evaluation_calls(config, feed, part, None)]
    assert [index.shape for index in seen] == [(K, 8)] * calls
    index = np.concatenate(seen)
    assert sorted(index[index >= 0]) == list(range(n))


def test_first_samples_are_spread_over_the_classes():
    y = np.array([0] * 10 + [1] * 10 + [2] * 2)
    assert list(batches.spread(y, 6)) == [0, 1, 10, 11, 20, 21]
    assert np.bincount(y[batches.spread(y, 8)]).tolist() == [3, 3, 2]
    assert len(batches.spread(y, None)) == 22


@pytest.mark.parametrize("n, kept", [(100, 85), (7, 6), (1, 1)])
def test_accuracy_b_keeps_the_first_85_percent_of_each_class_rounded_up(n, kept):
    y = np.repeat([3, 5], n)
    train, val = batches.split_per_class(y, np.arange(2 * n), 0.15)
    assert train.tolist() == [*range(kept), *range(n, n + kept)]
    assert sorted([*train, *val]) == list(range(2 * n))


def test_partition_refuses_too_few_samples():
    dataset = Dataset("MNIST", split_of(10), split_of(10), "here")
    with pytest.raises(UserError, match="10 training samples make no batch of -batch_size 16; give 10 or less"):
        batches.partition(Config(dataset_name="MNIST"), dataset)


@pytest.mark.parametrize("wrong, of", [(10, "train"), (10, "test"), (-1, "train")])
def test_partition_refuses_a_label_that_is_no_class(wrong, of):
    """It would train, and be left out of the accuracy."""
    splits = {"train": split_of(40), "test": split_of(40)}
    splits[of].y[7] = wrong
    dataset = Dataset("MNIST", *splits.values(), "here")
    with pytest.raises(UserError, match=f"MNIST has a sample with label {wrong}; its 10 classes are 0 to 9"):
        batches.partition(Config(dataset_name="MNIST"), dataset)


@pytest.mark.parametrize(("ratio", "more"), [(0.02, "-train_samples 500 or more, or a"), (0.001, "a")])
def test_what_leaves_none_to_validate_is_told_with_what_helps(ratio, more):
    dataset = Dataset("MNIST", split_of(600), split_of(10), "here")
    config = Config(dataset_name="MNIST", val_ratio=ratio, train_samples=100)
    with pytest.raises(UserError, match=f"no sample for val: give {more} larger -val_ratio"):
        batches.partition(config, dataset)


@pytest.mark.parametrize("val_ratio", [None, 0.15])
def test_partition_refuses_no_training_samples(val_ratio):
    dataset = Dataset("MNIST", split_of(0), split_of(10), "here")
    with pytest.raises(UserError, match=r"MNIST has no sample for train: .* more train samples"):
        batches.partition(Config(dataset_name="MNIST", val_ratio=val_ratio), dataset)


@pytest.mark.parametrize("devices", (1, 2))
def test_device_memory_and_disk_give_the_same_batches(devices):
    chosen, part = jax.devices()[:devices], samples(40)
    index = batches.evaluation_batches(part, 8)

    def seen(feed):
        pick = jax.pmap(lambda x, i: x[i], in_axes=(feed.axis, 0), devices=chosen)
        return [
            (np.asarray(pick(x, i))[i >= 0].tolist(), np.asarray(pick(y, i))[i >= 0].tolist())
            for x, y, i in feed.chunks(index, [2, 2, 1])
        ]

    resident, streamed = (seen(batches.Feed(part.split, chosen, on)) for on in ("yes", "no"))
    assert resident == streamed
    assert sorted(np.concatenate([x for x, _ in resident]).ravel()) == list(range(40))


def test_samples_are_chosen_in_the_order_of_the_file_where_classes_tie():
    y = np.repeat(np.arange(10), 100)
    assert batches.spread(y, 15).tolist() == sorted([*range(0, 1000, 100), *range(1, 500, 100)])


@pytest.mark.parametrize("what, other", [("y", lambda y: y[::-1].copy()), ("x", lambda x: x.view(np.int8))])
def test_the_digest_of_samples_is_of_labels_and_types_too(what, other):
    part = samples(40)
    changed = dataclasses.replace(part.split, **{what: other(getattr(part.split, what))})
    assert batches.digest(part) != batches.digest(dataclasses.replace(part, split=changed))


def test_a_set_of_one_batch_is_trained_on():
    dataset = Dataset("MNIST", split_of(16), split_of(10), "here")
    assert len(batches.partition(Config(dataset_name="MNIST"), dataset)["train"]) == 16


@pytest.mark.parametrize("on_device", ["yes", "no"])
def test_what_fills_a_batch_up_is_told_wherever_data_lie(on_device):
    *_, told = batches.Feed(split_of(8), jax.devices()[:2], on_device).take(np.array([[3, 5, -1, -1]]))
    assert (told >= 0).tolist() == [[[True, True]], [[False, False]]]


def test_several_processes_read_from_disk_what_one_holds_in_memory(monkeypatch):
    split, chosen = split_of(8), jax.devices()[:1]
    assert batches.Feed(split, chosen, "auto").axis is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert batches.Feed(split, chosen, "auto").axis == 0
