"""An image set, from its official files through augmentation and the static layers to a learned network."""

import gzip
import struct

import numpy as np

from plif_jax.config import Config
from plif_jax.training import loop
from plif_jax.training.logs import read_metrics


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_bars(folder, name, count):
    """Images of ten kinds: a bright bar, lower from kind to kind."""
    y = np.arange(count, dtype=np.uint8) % 10
    x = np.random.default_rng(count).integers(0, 60, (count, 28, 28), np.uint8)
    for image, label in zip(x, y, strict=True):
        image[2 * label + 3 : 2 * label + 6, 4:24] = 255
    write_idx(folder / f"{name}-images-idx3-ubyte.gz", x)
    write_idx(folder / f"{name}-labels-idx1-ubyte.gz", y)


def test_fashion_mnist_s_network_learns_bars(tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    write_bars(tmp_path / "FashionMNIST", "train", 100)
    write_bars(tmp_path / "FashionMNIST", "t10k", 30)
    config = Config(
        dataset_name="FashionMNIST",
        use_plif=True,
        use_max_pool=True,
        detach_reset=True,
        T=2,
        batch_size=10,
        max_epoch=2,
        device="cpu:0",
        data_root=str(tmp_path),
        log_dir_prefix=str(tmp_path / "logs"),
    )
    said = []
    result = loop.train(config, say=said.append)
    assert not any("has no effect" in line for line in said)  # only what was given is told
    assert result["samples"] == {"train": 100, "test": 30}
    curve = [value for _, value in read_metrics(config.run_dir)["test_accuracy"]]
    assert curve[0] < 0.5 < curve[1], curve
