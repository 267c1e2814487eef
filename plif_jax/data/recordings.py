"""Which recordings of a data set there are, and where: every layout its users have."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plif_jax.catalog import ASL_LETTERS, CIFAR10_CLASSES, DATASETS
from plif_jax.data import archives, storage
from plif_jax.data.dataset import existing, folders
from plif_jax.errors import UserError

LAYOUTS = {
    "NMNIST": "Train/<digit>/<number>.bin and Test/..., or Train.zip and Test.zip",
    "CIFAR10DVS": "<class>/*.aedat, <class>/*.aedat4, <class>.zip, or CIFAR10DVS.zip of such zips",
    "DVS128Gesture": "DvsGesture/ with trials_to_*.txt, DvsGesture.tar.gz, tonic's ibmGestureTrain and ibmGestureTest",
    "ASLDVS": "<letter>/<letter>_<number>.mat, ICCV2019_DVS_dataset.zip, or ASLDVS.zip",
}
FOLDERS = {  # names, without case and punctuation, of folders that hold a data set
    "NMNIST": {"nmnist"},
    "CIFAR10DVS": {"cifar10dvs"},
    "DVS128Gesture": {"dvs128gesture", "dvsgesture"},
    "ASLDVS": {"asldvs", "iccv2019dvsdataset"},
}
INNER = {"events", "extract", "extracted", "download"}  # and of folders in them: the paper's and SpikingJelly's trees


class Recording(NamedTuple):
    """A file, its label, and which part of it, in microseconds; None: all of it."""

    path: str
    label: int
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Found:
    """The recordings of a data set, in order of label and number; of how many the whole set has; and where they lie."""

    train: list[Recording]
    test: list[Recording]
    expected: tuple[int, int]
    folder: Path


def find(name: str, root: str | Path, cache_dir: str | Path, cifar10dvs_split: str = "paper") -> Found | None:
    """Finds the recordings of a data set under a folder, in any layout; None if there are none.

    The folder may be the data set's own or hold it, under its name in any case and with or without punctuation.
    Archives are unpacked under `cache_dir`, once.

    Raises:
      UserError: `root` is no folder, an archive or a label file is damaged, or an unknown split.
    """
    for folder in folders(existing(root), FOLDERS.get(name, set()) | INNER):
        with storage.reading(folder):
            splits = FINDERS[name](folder, Path(cache_dir))
        if splits is not None:
            train, test, *expected = splits
            if name == "CIFAR10DVS":
                train, test = split_cifar10dvs(train, cifar10dvs_split)
            return Found(train, test, expected[0] if expected else DATASETS[name].samples, folder)
    return None


def split_cifar10dvs(recordings, split):
    """Splits CIFAR10-DVS, which has no split of its own, by the number in each file's name.

    paper: 0-899 of each class train, 900-999 test, as the paper's program does.
    tebn: 100-999 train, 0-99 test, as TEBN (Duan et al., NeurIPS 2022) and many works after it do.

    Raises:
      UserError: another split, a name without such a number, or two recordings of a class with one.
    """
    tests = {"paper": range(900, 1000), "tebn": range(100)}
    if split not in tests:
        raise UserError(f"cifar10dvs_split is {split!r}; allowed are {', '.join(tests)}.")
    return _split_by_number(recordings, range(1000), tests[split])


def _split_by_number(recordings, allowed: range, tests: range):
    """Splits recordings by the number in each one's name; a copy of a test recording must not train."""
    train, test, seen = [], [], {}
    for recording in recordings:
        number = _number(Path(recording.path))
        if number not in allowed:
            known = f"{allowed[0]} to {allowed[-1]}"
            raise UserError(f"{recording.path}: its number, which tells the split, is not one of {known}.")
        if (recording.label, number) in seen:
            both = f"{seen[recording.label, number]} and {recording.path}"
            raise UserError(f"{both} have one number, which tells the split: remove the copy.")
        seen[recording.label, number] = recording.path
        (test if number in tests else train).append(recording)
    return train, test


def _child(folder: Path, name: str) -> Path | None:
    """The entry of a folder with this name, in any case."""
    return next((child for child in sorted(folder.iterdir()) if child.name.lower() == name.lower()), None)


def _inside(folder: Path, name: str, archive: str, cache_dir: Path) -> Path | None:
    """The folder `name` in a folder, or where it holds no file the archive that lies there too, unpacked.

    An archive may hold that folder or what belongs into it; and unpacking may have wrapped it in another of its name.
    """
    child, packed = _child(folder, name), _child(folder, archive)
    if not _holds_files(child):
        if packed is None:
            return None
        unpacked = archives.unpacked(packed, cache_dir)
        child = _child(unpacked, name) or unpacked
    while (inner := _child(child, name)) is not None and inner.is_dir():
        child = inner
    return child


def _holds_files(folder: Path | None, depth: int = 3) -> bool:
    """Whether there is a file in a folder or its folders, which may be links."""
    children = _shown(folder) if folder is not None and folder.is_dir() else []
    return any(child.is_file() or (depth > 0 and _holds_files(child, depth - 1)) for child in children)


def _shown(folder: Path) -> list[Path]:
    """What a folder holds, in order of name, without what file managers hide there."""
    return [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]


def _unwrapped(archive: Path, name: str, cache_dir: Path) -> Path:
    """The folder of a set's recordings in an archive of all of them, unpacked."""
    return next(folders(archives.unpacked(archive, cache_dir), FOLDERS[name] | INNER))


def _number(path: Path) -> int:
    """The last number in a file's name; -1 without one."""
    return int((re.findall(r"\d+", path.stem) or [-1])[-1])


def _recordings(folder: Path | None, label: int, *suffixes: str) -> list[Recording]:
    """The recordings in a folder that end in the first of the suffixes that any has, in order of their numbers."""
    files = _shown(folder) if folder and folder.is_dir() else []
    for suffix in suffixes:
        ours = [file for file in files if file.suffix.lower() == suffix and not file.is_dir()]
        _refuse_copies(ours)
        if ours:
            return [Recording(str(file), label) for file in sorted(ours, key=lambda file: (_number(file), file.name))]
    return []


def _refuse_copies(entries: list[Path]):
    """Raises UserError if an entry of a folder is by its name a copy of another."""
    stems = {entry.stem for entry in entries}
    for entry in entries:
        original = re.sub(r" ?\(\d+\)$| - Copy$| copy$", "", entry.stem)
        if original != entry.stem and original in stems:
            raise UserError(f"{entry} is by its name a copy of {original}{entry.suffix}: remove it.")


def _nmnist(folder, cache_dir):
    """N-MNIST, and what is laid out as it is."""
    splits = []
    for split in ("Train", "Test"):
        inside = _inside(folder, split, f"{split}.zip", cache_dir)
        splits.append([r for digit in range(10) for r in _recordings(inside and inside / str(digit), digit, ".bin")])
    return splits if any(splits) else None


def _cifar10dvs(folder, cache_dir):
    """CIFAR10-DVS, not split yet."""
    packed = _child(folder, "CIFAR10DVS.zip")
    if packed is not None and not any(_holds_files(_child(folder, name)) for name in CIFAR10_CLASSES):
        folder = _unwrapped(packed, "CIFAR10DVS", cache_dir)
    found = []
    for label, name in enumerate(CIFAR10_CLASSES):
        found += _recordings(_inside(folder, name, f"{name}.zip", cache_dir), label, ".aedat", ".aedat4")
    return (found, []) if found else None


def _dvs128_gesture(folder, cache_dir):
    """DVS128 Gesture, as published or as tonic has it, or a folder of 5-byte files with labels.txt."""
    original = _inside(folder, "DvsGesture", "DvsGesture.tar.gz", cache_dir) or folder
    lists = [original / f"trials_to_{split}.txt" for split in ("train", "test")]
    if lists[0].is_file():
        names = [_text(trials).split() if trials.is_file() else [] for trials in lists]
        if twice := _repeated([Path(name).name for name in (*names[0], *names[1])]):
            raise UserError(f"{lists[0]} and {lists[1].name} name {twice} twice: name it once.")
        splits = [_trials(original, ours) for ours in names]
        if any(splits):
            return splits
    recut = [
        _inside(folder, f"ibmGesture{split}", f"ibmGesture{split}.tar.gz", cache_dir) for split in ("Train", "Test")
    ]
    if any(recut):
        splits = [[r for n in range(11) for r in _recut(inside, n)] for inside in recut]
        if not any(splits):
            raise UserError(f"{folder}: ibmGestureTrain and ibmGestureTest hold no <user>_<lighting>/<gesture>.npy.")
        return [*splits, (1077, 264)]
    if (folder / "labels.txt").is_file() and any(folder.glob("*.bs2")):
        # A handful of samples, for looking at: nobody says which are for testing.
        listed = _listed(folder, folder / "labels.txt")
        return (listed, []) if listed else None
    return None


def _trials(folder, names):
    """The samples of the recordings of these names, cut as their label files say."""
    samples = []
    for name in names:
        recording, labels = folder / name, folder / f"{Path(name).stem}_labels.csv"
        if not recording.is_file():
            continue  # an incomplete set
        if not labels.is_file():
            raise UserError(f"{labels}: no such file; it tells where in {name} the gestures begin and end.")
        lines = [line for line in _text(labels).splitlines() if line.strip()]
        try:
            if lines and not re.search("[A-Za-z]", lines[0]):
                raise ValueError("its first line does not name the columns")
            if len(lines) < 2:
                raise ValueError("it has no row")
            rows = np.loadtxt(lines, np.int64, delimiter=",", skiprows=1, ndmin=2)
            if (start := _repeated([start for _, start, _ in rows])) is not None:
                raise ValueError(f"two gestures begin at {start}")
            for number, start, end in rows:
                if not 0 <= start < end:
                    raise ValueError(f"nothing lies between {start} and {end}")
                label = _gesture(number)
                samples.append((label, name, Recording(str(recording), label, int(start), int(end))))
        except (OSError, ValueError) as error:
            raise UserError(f"{labels}: cannot be read as class, startTime_usec, endTime_usec ({error}).") from None
    samples.sort(key=lambda sample: sample[:2])  # stable: a gesture shown twice keeps its order
    return [recording for *_, recording in samples]


def _recut(folder, label):
    """Tonic's re-cut: <user>_<lighting>/<label>.npy."""
    users = _shown(folder) if folder else []
    _refuse_copies(users)
    return [r for user in users for r in _recordings(user, label, ".npy") if Path(r.path).stem == str(label)]


def _listed(folder, labels):
    """The 5-byte recordings that a list of `<number> <class from 1>` names."""
    rows = [line.split()[:2] for line in _text(labels).splitlines() if line.strip() and line[0] != "#"]
    try:
        samples = sorted((_gesture(label), int(number)) for number, label in rows)
        if (twice := _repeated([number for _, number in samples])) is not None:
            raise ValueError(f"number {twice} is there twice")
    except ValueError as error:
        raise UserError(f"{labels}: cannot be read as lines of number and class ({error}).") from None
    files = [(folder / f"{number}.bs2", label) for label, number in samples]
    return [Recording(str(file), label) for file, label in files if file.is_file()]


def _gesture(number):
    """The label of a gesture, which the files count from 1; ValueError if there is no such gesture."""
    classes = DATASETS["DVS128Gesture"].classes
    if not 1 <= int(number) <= classes:
        raise ValueError(f"class {number} is not one of 1 to {classes}")
    return int(number) - 1


def _repeated(values):
    """The first value that was there before; None if there is none."""
    seen = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def _text(path):
    """A text file's content."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file.") from None


def _asldvs(folder, cache_dir):
    """ASL-DVS, of whose letters the first 80 % train."""
    packed = _child(folder, "ICCV2019_DVS_dataset.zip") or _child(folder, "ASLDVS.zip")
    if packed is not None and not _holds_files(_child(folder, "a")):
        folder = _unwrapped(packed, "ASLDVS", cache_dir)
    found = [r for n, letter in enumerate(ASL_LETTERS) for r in _recordings(_child(folder, letter), n, ".mat")]
    return _split_by_number(found, range(1, 4201), range(3361, 4201)) if found else None


FINDERS = {
    "NMNIST": _nmnist,
    "Digits": _nmnist,
    "CIFAR10DVS": _cifar10dvs,
    "DVS128Gesture": _dvs128_gesture,
    "ASLDVS": _asldvs,
}
