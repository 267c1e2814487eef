"""Curves of other people's runs, such as the paper authors': found, read, and matched to a run of ours.

Three forms are read: CSV as TensorBoard exports it, `run-RUN-tag-TAG.csv` with columns Wall time, Step, Value;
TensorBoard's event files in a folder named as the run; and accuracy-B as `accuracy_B/DATASET.csv`, a table with columns
epoch, val_accuracy and test_accuracy, as can be made of what the authors' program printed.
"""

import csv
import dataclasses
import re
import struct
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from plif_jax.catalog import DATASETS
from plif_jax.config import Config
from plif_jax.errors import UserError

RUN_NAME = re.compile(
    r"(?:val_(?P<val_ratio>[\d.e-]+)_)?(?P<dataset_name>[A-Za-z0-9]+)_init_tau_(?P<init_tau>[\d.e+]+)"
    r"_use_plif_(?P<use_plif>True|False)_use_max_pool_(?P<use_max_pool>True|False)_T_(?P<T>\d+)"
    r"(?:_c_(?P<channels>\d+)_n_(?P<number_layer>\d+)_split_by_(?P<split_by>\w+?)_normalization_(?P<normalization>\w+?))?"
    r"_detach_reset_(?P<detach_reset>True|False)"
)
# A curve whose run differs in one of these says nothing about ours; differing in others it is shown with a warning.
MUST_AGREE = ("dataset_name", "val_ratio", "use_plif", "init_tau", "use_max_pool")
# Settings that the name of a run does not tell; the published runs have the defaults, ours beside them in config.json.
UNNAMED = (
    *("batch_size", "learning_rate", "T_max", "alpha_learnable", "train_samples", "test_samples", "precision"),
    *("cifar10dvs_split", "eval_every"),
)

# After how many epochs curves are compared.
EPOCHS = (1, 5, 10, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A published run: its name, what differs from ours ("T is 10, theirs 20"), and {tag: [(step, value), ...]}."""

    run_name: str
    differences: list[str]
    metrics: dict[str, list[tuple[int, float]]]


def load(folder: str | Path, config: Config, besides: Path | None = None) -> Reference:
    """The curves under `folder` whose run's settings are those of `config`, or are nearest to them.

    Those of a run in the folder `besides` do not count.

    Raises:
      UserError: there are no curves, none of such a run or those of several, or a file of them is damaged.
    """
    own = besides and besides.resolve()
    runs = {name: [path for path in paths if path.parent != own] for name, paths in find(folder).items()}
    runs = {name: paths for name, paths in runs.items() if paths}
    if not runs:
        raise UserError(
            f"{folder} holds no curves of another run; give a folder with TensorBoard event files or "
            "run-RUN-tag-TAG.csv files"
        )
    ours = settings_of(config.run_name)
    candidates = {}
    for name in sorted(runs):
        theirs = settings_of(name)
        if all(theirs[setting] == ours[setting] for setting in MUST_AGREE):
            candidates[name] = differences(config, name, _config_beside(runs[name]))
    if not candidates:
        raise UserError(f"{folder} holds no curves of a run like {config.run_name}; {_choice(runs, config)}")
    name = min(candidates, key=lambda name: len(candidates[name]))
    places = sorted({str(path.parent) for path in runs[name] if path.suffix != ".csv"})
    if len(places) > 1:
        raise UserError(f"{name} was run more than once: give one of {', '.join(places)}")
    return Reference(name, candidates[name], read(runs[name]))


def differences(config: Config, run_name: str, theirs: Config | None = None) -> list[str]:
    """What differs between a run and another, as "T is 10, theirs 20"; also what the name does not tell.

    `theirs` are the other's settings where they are known.
    """
    unnamed = UNNAMED if theirs is None else (*UNNAMED, "seed")
    other = theirs or Config(dataset_name=config.dataset_name)
    ours, theirs = (
        settings_of(name) | {s: getattr(settings, s) for s in unnamed}
        for name, settings in ((config.run_name, config), (run_name, other))
    )
    return [f"{s} is {ours[s]}, theirs {theirs[s]}" for s in ours if ours[s] != theirs[s]]


def _config_beside(paths):
    """The settings of a run of this program, which lie beside its event files; None of others."""
    folder = paths[0].parent
    return Config.of_run(folder) if (folder / "config.json").is_file() else None


def parts_used(samples, dataset_name) -> list[str]:
    """How much of the data set a run had, where that was not all; `samples` as its result has them."""
    ours = {"training": samples["train"] + samples.get("val", 0), "testing": samples["test"]}
    parts = zip(ours.items(), DATASETS[dataset_name].samples, strict=True)
    return [f"of {whole} samples for {what} ours had {n}" for (what, n), whole in parts if n < whole]


def _choice(runs, config):
    """In a few words what there is: this data set's runs, or else the data sets."""
    found = [settings_of(name) for name in sorted(runs)]
    same = [
        ", ".join(f"{s} {theirs[s]}" for s in MUST_AGREE[1:] if theirs[s] is not None)
        for theirs in found
        if theirs["dataset_name"] == config.dataset_name
    ]
    if same:
        return f"its {config.dataset_name} runs have {'; '.join(dict.fromkeys(same))}"
    return f"its data sets are {', '.join(dict.fromkeys(theirs['dataset_name'] for theirs in found))}"


def settings_of(run_name: str) -> dict[str, str | None]:
    """The settings that the name of a run folder tells, as text."""
    return RUN_NAME.search(run_name).groupdict()


def find(folder: str | Path) -> dict[str, list[Path]]:
    """The files of each published run under `folder`, {run name: paths}.

    Raises:
      UserError: it is no folder.
    """
    folder = Path(folder).resolve()  # "." has no name
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one with the published curves")
    runs = {}
    for path in sorted(folder.rglob("*")):
        if path.parent.name == "accuracy_B" and path.suffix == ".csv" and path.stem in DATASETS:
            name = accuracy_b_name(path.stem)
        elif path.suffix == ".csv" and "-tag-" in path.stem:
            name = path.stem.removeprefix("run-").split("-tag-")[0]
        elif path.name.startswith("events.out.tfevents."):
            name = path.parent.name
        else:
            continue
        if RUN_NAME.search(name):
            runs.setdefault(name, []).append(path)
    return runs


def accuracy_b_name(dataset_name: str) -> str:
    """The name of the run that the paper's authors report as accuracy-B; for N-MNIST they took T = 20."""
    T = 20 if dataset_name == "NMNIST" else None
    return Config(
        dataset_name=dataset_name, T=T, use_plif=True, use_max_pool=True, detach_reset=True, val_ratio=0.15
    ).run_name


def read(paths) -> dict[str, list[tuple[int, float]]]:
    """The scalars in some files of one run, {tag: [(step, value), ...]} by step; of doubled steps the last written.

    Raises:
      UserError: a file is damaged or has other columns.
    """
    points = {}
    for path in paths:
        reader = _read_csv if path.suffix == ".csv" else _read_events
        try:
            for tag, time, step, value in reader(path):
                points.setdefault(tag, []).append((time, step, value))
        except KeyError as error:
            raise UserError(f"{path} is damaged (it has no column {error}); fetch it again") from None
        except (ValueError, csv.Error, DecodeError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None
    return {tag: sorted({step: value for _, step, value in sorted(rows)}.items()) for tag, rows in points.items()}


def _read_csv(path):
    """Yields (tag, wall time, step, value) of a CSV file."""
    _, _, tag = path.stem.partition("-tag-")
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines, strict=True):
            if tag:
                time, step, value = (row[name] or "missing" for name in ("Wall time", "Step", "Value"))
                yield tag, float(time), int(step), float(value)
            else:
                for name in ("val_accuracy", "test_accuracy"):
                    yield name, 0.0, int(row["epoch"]), float(row[name] or "missing")


def _read_events(path):
    """Yields (tag, wall time, step, value) of the scalars in a TensorBoard event file."""
    for record in _tfrecords(path.read_bytes()):
        event = Event.FromString(record)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.wall_time, event.step, value.simple_value


def _tfrecords(data):
    """Yields the records of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    at = 0
    while at < len(data):
        header = data[at : at + 12]
        if len(header) < 12 or masked_crc32c(header[:8]) != struct.unpack("<I", header[8:])[0]:
            raise ValueError(f"no record begins at byte {at} of {len(data)}")
        end = at + 12 + struct.unpack("<Q", header[:8])[0]
        record, checksum = data[at + 12 : end], data[end : end + 4]
        if len(checksum) < 4 or masked_crc32c(record) != struct.unpack("<I", checksum)[0]:
            raise ValueError(f"the record at byte {at} of {len(data)} is cut off or changed")
        yield record
        at = end + 4


def differences_at(ours, theirs):
    """(epochs trained, our value, their value) at each of `EPOCHS` that both curves have, and at the last such one.

    Curves are [(epoch, value), ...] counted from 0: "after one epoch" is their point 0.
    """
    ours, theirs = dict(ours), dict(theirs)
    common = sorted(ours.keys() & theirs.keys())
    asked = {epoch - 1 for epoch in EPOCHS}
    return [(e + 1, ours[e], theirs[e]) for e in common if e in asked or e == common[-1]]
