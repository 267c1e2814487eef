"""One run's settings: a frozen dataclass whose field names are the flags of the paper's program."""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import reprlib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plif_jax.catalog import DATASETS
from plif_jax.errors import UserError, nearest

# Settings of which each data set has its own in the paper.
PER_DATASET = ("T", "channels", "number_layer")


def _field(help, default, **bounds):
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run; every field is a flag, with one dash or two.

    The first block has the paper program's names, meanings and defaults. What that program leaves without a default
    has the paper's value for the data set here. `val_ratio` set means accuracy-B, unset accuracy-A. Switches are off
    unless given, as in that program; the classes in `networks` have all but `alpha_learnable` on.

    Raises:
      UserError: a value out of range, in one line that says what is allowed.
    """

    dataset_name: str = _field("data set", None, choices=tuple(DATASETS))
    init_tau: float = _field("tau of LIF neurons, initial tau of PLIF neurons, in timesteps", 2.0, above=1, below=1e30)
    use_plif: bool = _field("PLIF neurons, LIF otherwise", False)
    use_max_pool: bool = _field("max pooling, average otherwise", False)
    alpha_learnable: bool = _field("learn the surrogate's alpha", False)
    detach_reset: bool = _field("let no gradient through the reset", False)
    T: int = _field("timesteps; the paper's for the data set if absent", None, least=1, below=2**31)
    channels: int = _field(
        "width of the convolutions, event data only; the data set's usual one if absent", None, least=1
    )
    number_layer: int = _field(
        "number of convolutions, event data only; the data set's usual one if absent", None, least=1
    )
    split_by: str = _field("frames of equal number of events, or of equal time", "number", choices=("number", "time"))
    normalization: str | None = _field(
        "of event frames; counts if absent", None, choices=("frequency", "max", "norm", "sum", None)
    )
    batch_size: int = _field("samples per training step, over all devices", 16, least=1)
    learning_rate: float = _field("Adam's, in the first epoch", 1e-3, above=0)
    T_max: int = _field("epochs from the learning rate's peak to zero", 64, least=1, below=2**31)
    max_epoch: int = _field("epochs to train", 1024, least=1)
    device: str | None = _field("cpu, tpu, cuda, cuda:0 or cuda:0,1; all devices if absent", None)
    log_dir_prefix: str = _field("folder for run folders and checkpoints", "logs")
    val_ratio: float | None = _field(
        "train_val.py: share of each class kept for validation, 0.15 there if absent", None, above=0, below=1
    )

    data_root: str | None = _field("folder with data sets you already have", None)
    cache_dir: str | None = _field("what is fetched or prepared; $PLIF_JAX_CACHE or ~/.cache/plif_jax if absent", None)
    cifar10dvs_split: str = _field("which samples of CIFAR10-DVS are the test's", "paper", choices=("paper", "tebn"))
    seed: int = _field("of initial weights, order, augmentation and dropout", 2020, least=0, below=2**32)
    train_samples: int | None = _field("train on the first n only, spread over the classes", None, least=1)
    test_samples: int | None = _field("test on the first n only, spread over the classes", None, least=1)
    eval_every: int = _field("evaluate after every n-th epoch, and the last", 1, least=1)
    precision: str = _field("of computation", "float32", choices=("float32", "bfloat16", "float64"))
    data_on_device: str = _field("keep the data set in device memory", "auto", choices=("auto", "yes", "no"))
    steps_per_call: int | None = _field(
        "training steps in one call to the device; if absent 1 on a CPU, at most 32 otherwise", None, least=1
    )
    coordinator: str | None = _field("address host:port of process 0, for several processes", None)
    num_processes: int | None = _field("number of processes", None, least=1)
    process_id: int | None = _field("rank of this process, from 0", None, least=0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        facts = self.facts
        for name in PER_DATASET:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(facts, name))
        if facts.events:
            (H, W, _), n = facts.shape, self.number_layer
            if n > facts.max_number_layer:
                most = facts.max_number_layer
                raise UserError(f"-number_layer {n}: a {H}x{W} sensor can be halved {most} times; give 1 to {most}")
            if self.channels * (H >> n) * (W >> n) < 4:  # of which the first linear layer keeps a quarter
                raise UserError(
                    f"-channels {self.channels} with -number_layer {n} leaves the hidden layer empty; "
                    "give more channels or fewer layers"
                )

    @property
    def facts(self):
        """The data set's sensor, classes and paper settings."""
        return DATASETS[self.dataset_name]

    @property
    def unused(self) -> tuple[str, ...]:
        """The names of settings that this data set does not use."""
        names = () if self.facts.events else ("channels", "number_layer", "split_by", "normalization")
        return names if self.dataset_name == "CIFAR10DVS" else (*names, "cifar10dvs_split")

    def without_effect(self) -> list[str]:
        """The names of settings that differ from the usual and that this data set does not use."""
        usual = Config(dataset_name=self.dataset_name)
        return [name for name in self.unused if getattr(self, name) != getattr(usual, name)]

    @property
    def run_name(self) -> str:
        """Name of the run folder, exactly as the paper's program builds it."""
        events = ""
        if self.facts.events:
            events = (
                f"_c_{self.channels}_n_{self.number_layer}_split_by_{self.split_by}_normalization_{self.normalization}"
            )
        val = "" if self.val_ratio is None else f"val_{self.val_ratio}_"
        return (
            f"{val}{self.dataset_name}_init_tau_{self.init_tau}_use_plif_{self.use_plif}_use_max_pool_"
            f"{self.use_max_pool}_T_{self.T}{events}_detach_reset_{self.detach_reset}"
        )

    @property
    def run_dir(self) -> Path:
        """Folder of logs, figures and the result."""
        return expanded(self.log_dir_prefix) / self.run_name

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of checkpoints, beside the run folder."""
        return expanded(self.log_dir_prefix) / f"pt_{self.run_name}"

    def elsewhere(self, data_root=None, cache_dir=None) -> "Config":
        """The same settings with the data in other folders; None leaves a folder as it is."""
        moved = {"data_root": data_root, "cache_dir": cache_dir}
        return dataclasses.replace(self, **{name: folder for name, folder in moved.items() if folder is not None})

    def to_json(self) -> str:
        """The settings as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Config":
        """The settings back from JSON text.

        Raises:
          UserError: the text is not JSON, holds other fields, or a value out of range.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not a run's settings: {error}") from None
        if type(fields) is not dict:
            raise UserError(f"not a run's settings but a {type(fields).__name__}")
        if unknown := fields.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise UserError(f"not a run's settings: there is no field {min(unknown)!r}")
        return cls(**fields)

    @classmethod
    def of_run(cls, folder: str | Path) -> "Config":
        """The settings of a run, from its folder.

        Raises:
          UserError: its config.json is damaged, or cannot be read.
          FileNotFoundError, NotADirectoryError: there is none.
        """
        path = Path(folder) / "config.json"
        try:
            return cls.from_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise
        except (UserError, OSError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from None


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _types(field):
    """The plain types that a field's annotation allows."""
    return typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)


def _checked(field, value):
    """A field's value as a plain Python type; an int as a float where one is asked for, since run names contain it."""
    allowed, bounds = _types(field), field.metadata
    if isinstance(value, np.bool_ | np.integer | np.floating | np.str_):
        value = value.item()
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if type(value) is int and value.bit_length() > 63:
        raise UserError(f"-{field.name}: {field.name} must be below 2**63, not a number of {value.bit_length()} bits")
    if value is None and (field.default is None or type(None) in allowed):
        if field.name != "dataset_name":
            return value
        raise UserError(f"-dataset_name is not given; it is one of {', '.join(DATASETS)}")
    if float in allowed and type(value) is int:
        return _checked(field, float(value))
    if type(value) not in allowed:
        given = reprlib.repr(value)  # short, of whatever a file nests
        raise UserError(f"-{field.name} {given}: {field.name} must be {WORDS[allowed[0]]}")
    given = f"-{field.name} {value}"
    if "choices" in bounds and value not in bounds["choices"]:
        choices = list(map(str, bounds["choices"]))
        near = nearest(str(value), choices)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"{given}: {field.name} must be one of {', '.join(choices)}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{given}: {field.name} must be finite")
    for bound, holds, words in (
        ("above", float.__gt__, "above"),
        ("least", float.__ge__, "at least"),
        ("below", float.__lt__, "below"),
    ):
        if bound in bounds and not holds(float(value), float(bounds[bound])):
            raise UserError(f"{given}: {field.name} must be {words} {bounds[bound]}")
    return value


class Parser(argparse.ArgumentParser):
    """Flags with one dash, as the paper's program has them, or two; mistakes are answered in one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own knows no -1e-3

    def add_argument(self, *names, **settings):
        """Adds a flag, `-flag` also as `--flag`."""
        twice = [f"-{name}" for name in names if re.match("-[A-Za-z]", name) and name != "-h"]
        return super().add_argument(*names, *twice, **settings)

    def error(self, message):
        """Raises what argparse complains of as a `UserError`, with the flag that may have been meant."""
        unknown = re.match(r"unrecognized arguments: -*([^\s=]+)", message)
        known = [name.lstrip("-") for action in self._actions for name in action.option_strings]
        near = unknown and nearest(unknown[1], known)
        raise UserError(f"{message}; {f'did you mean -{near}?' if near else '-h lists the flags'}")


def _convert(field, text):
    kind = _types(field)[0]
    if text == "None":
        return None
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"-{field.name} {text}: {field.name} is a switch; give nothing, true or false")
        return text.lower() == "true"
    try:
        if "_" in text and kind in (int, float):  # Python would take 1_0 for 10
            raise ValueError
        return kind(text)
    except ValueError:
        raise UserError(f"-{field.name} {text or 'without a value'}: {field.name} must be {WORDS[kind]}") from None


def refuse_unknown(argv: list[str], flags):
    """Raises a `UserError` with the nearest flag where an argument is none, nor a value.

    For argparse by itself takes -max for -max_epoch, and -T_max 5 misspelt for -T with a value.
    """
    for argument in argv:
        flag = argument.lstrip("-").split("=")[0]
        if re.match("--?[A-Za-z]", argument) and flag not in (*flags, "h", "help"):
            near = nearest(flag, flags)
            hint = f"did you mean -{near}?" if near else "-h lists the flags"
            raise UserError(f"unknown argument {argument}; {hint}")


def parse(argv: list[str], description: str = "", **defaults) -> Config:
    """Settings from a command line: `defaults`, then the file after -config, then the flags, later ones winning.

    Raises:
      UserError: an unknown flag (the nearest one is named), a value of the wrong type or out of range.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("-config", help="Python file with `config = Config(...)`, as in configs/")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name, field in fields.items():
        switch = dict(nargs="?", const="true") if field.type is bool else {}
        choices = field.metadata.get("choices")
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _types(field)[0].__name__.upper()
        default = "" if field.default is None else f" (default {field.default})"
        parser.add_argument(f"-{name}", metavar=metavar, help=field.metadata["help"] + default, **switch)
    refuse_unknown(argv, ["config", *fields])
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; -h lists the flags")
    given = vars(given)
    settings = dict(defaults)
    if "config" in given:
        loaded = load(given.pop("config"))
        # For another data set than the file's, that one's paper settings and not these.
        other = given.get("dataset_name", loaded.dataset_name) != loaded.dataset_name
        left = [name for name in PER_DATASET if other and getattr(loaded, name) == getattr(loaded.facts, name)]
        settings |= {k: v for k, v in dataclasses.asdict(loaded).items() if v is not None and k not in left}
    settings |= {name: _convert(fields[name], text) for name, text in given.items()}
    return Config(**settings)


def expanded(folder: str | Path) -> Path:
    """A folder with its `~` written out.

    Raises:
      UserError: nobody's home is known by that name, or it is an address.
    """
    if re.match(r"[A-Za-z][\w.+-]+:/", str(folder)):  # of gs:// pathlib leaves gs:/
        raise UserError(f"{folder}: an address; give a folder, such as one where that place is mounted.")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UserError(f"{folder}: no such home folder is known; write the folder out.") from None


def load(path: str | Path) -> Config:
    """The `config` of a Python file such as those in `configs/`.

    Raises:
      UserError: there is no such file, it does not run, or it defines no `config`.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"-config {path}: a folder; give one of the files in it")
    if not path.is_file():
        raise UserError(f"-config {path}: no such file, seen from {Path.cwd()}; configs/ has one for each data set")
    spec = importlib.util.spec_from_file_location("plif_jax_run_config", path)
    if spec is None:
        raise UserError(f"-config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"-config {path}: {error}") from None
    except (Exception, SystemExit) as error:
        said = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise UserError(f"-config {path}: {said}") from None
    if not isinstance(getattr(module, "config", None), Config):
        raise UserError(f"-config {path}: defines no `config = Config(...)`")
    return module.config
