"""Small recordings, written in the true forms of the event data sets."""

import struct
import zipfile
from pathlib import Path

import numpy as np

from plif_jax.data import recordings
from plif_jax.data.digits import write_recording


def random_events(seed, n, height, width, duration=90_000):
    """Return n events in order of time."""
    r = np.random.RandomState(seed)
    t = np.sort(r.randint(0, duration, n))
    return {"t": t, "x": r.randint(0, width, n), "y": r.randint(0, height, n), "p": r.randint(0, 2, n)}


def write_nmnist(root, train=3, test=2, n=200):
    """Write `train` and `test` recordings of each digit; the numbers are such that sorting by name is wrong."""
    for split, count in (("Train", train), ("Test", test)):
        for digit in range(10):
            folder = root / split / str(digit)
            folder.mkdir(parents=True)
            for k in range(count):
                number = (2, 10, 9, 100)[k]
                events = random_events(digit * 1000 + number + (split == "Test"), n, 34, 34)
                write_recording(folder / f"{number}.bin", events)


def write_aedat2(path, events):
    """Write DVS128 events as jAER does: big-endian address and time; events are in the paper program's coordinates."""
    address = (127 - events["x"]) << 1 | events["y"] << 8 | (1 - events["p"])
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Timestamps tick is 1 us\r\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + np.stack([address, events["t"]], 1).astype(">u4").tobytes())


def write_aedat3(path, events, packet=50):
    """Write polarity packets as cAER does, with a packet of special events before each."""
    out = [b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"]
    words = np.stack([events["x"] << 17 | events["y"] << 2 | events["p"] << 1 | 1, events["t"]], 1).astype("<u4")
    for first in range(0, len(words), packet):
        for kind, data in ((0, np.array([[3, 7]], "<u4")), (1, words[first : first + packet])):
            out.append(struct.pack("<HHIIIIII", kind, 1, 8, 4, 0, len(data), len(data), len(data)) + data.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(out))


def numbers(ours):
    """The numbers in the names of recordings."""
    return [int(Path(recording.path).stem.split("_")[-1]) for recording in ours]


def pack(folder, archive):
    """Zip a folder, under its own name, and remove nothing."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, file.relative_to(folder.parent))
    return archive


def write_cifar10dvs(root, count=(0, 2, 99, 100, 899, 900, 999), classes=recordings.CIFAR10_CLASSES):
    for label, name in enumerate(classes):
        for number in count:
            path = root / name / f"cifar10_{name}_{number}.aedat"
            write_aedat2(path, random_events(1000 * label + number, 60, 128, 128))
