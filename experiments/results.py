"""Runs the rows of RESULTS.md, as far as the time allows, and writes the page anew.

    python experiments/results.py digits nmnist_a -data_root DATA -minutes 20
    python experiments/results.py mnist fashion_mnist cifar10 -data_root DATA -minutes 25     # on a GPU
    python experiments/results.py                                                             # only the page

Each row is a command that trains; when its share of the time is up it is told to stop, saves, and the next call goes on
from there. Flags of train.py that make no other run, such as -data_root and -cache_dir, are passed on. What a row has
reached is kept in docs/results/ROW.json and its picture beside it, unless more epochs are kept already; RESULTS.md is
made from these, and from what docs/results/ROW.md says of them: a run that takes a row's place removes it. Nothing
enters the page that was not run.
"""

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablation
from plif_jax import cli, config, data, files
from plif_jax.config import Parser, refuse_unknown
from plif_jax.curves import summary
from plif_jax.errors import UserError
from plif_jax.training import signals
from plif_jax.training.checkpoint import MAY_CHANGE
from plif_jax.training.logs import read_metrics

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "results"
EPOCHS = (1, 5, 10, 32, 64)

HARDWARE = ("devices", "machine", "versions")
FIGURES = (
    *("protocol", "best", "last", "epochs", "finished", "samples", "tau_before", "tau"),
    *("seconds", "samples_per_second", *HARDWARE),
)

SMALL = "narrower or shorter than the paper, so not comparable with its figures"
FIRST = "where DATA holds only its first 1000 training and 100 test recordings"
FULL = "the paper's settings"
# name: (script with flags of its own, flags of a run, what it is)
ROWS = {
    "digits": ("train.py", "-config configs/digits.py", "the quickstart, simulated events; not in the paper"),
    "nmnist_a": (
        "train.py",
        "-config configs/nmnist.py",
        f"N-MNIST, 16 channels, {FIRST}, {SMALL}",
    ),
    "nmnist_b": (
        "train_val.py",
        "-config configs/nmnist.py",
        f"N-MNIST, 16 channels, accuracy-B, {FIRST}, {SMALL}",
    ),
    "ablation": (
        "ablation.py -datasets Digits -seeds 2020 2021 2022",
        "-config configs/digits.py",
        "the paper's five settings on the quickstart's data, mean and deviation over three seeds; not in the paper",
    ),
    "mnist_small": (
        "train.py",
        "-config configs/mnist.py -train_samples 1000 -test_samples 500 -max_epoch 5 -T_max 5",
        f"MNIST, on a part of the data, {SMALL}",
    ),
    "fashion_mnist_small": (
        "train.py",
        "-config configs/fashion_mnist.py -train_samples 1000 -test_samples 500 -max_epoch 5 -T_max 5",
        f"Fashion-MNIST, on a part of the data, {SMALL}",
    ),
    "mnist": ("train.py", "-config configs/mnist.py", f"MNIST, {FULL}"),
    "fashion_mnist": ("train.py", "-config configs/fashion_mnist.py", f"Fashion-MNIST, {FULL}"),
    "cifar10": ("train.py", "-config configs/cifar10.py", f"CIFAR-10, {FULL}"),
    "nmnist": ("train.py", "-config configs/nmnist_paper.py", f"N-MNIST, {FULL}"),
    "cifar10dvs": ("train.py", "-config configs/cifar10dvs.py", f"CIFAR10-DVS, {FULL}"),
    "dvs128gesture": ("train.py", "-config configs/dvs128gesture.py", f"DVS128 Gesture, {FULL}"),
}


def run(name, more, logs, deadline):
    """Trains a row until it is finished or the time is up, then keeps what it reached."""
    _kept(name)  # damaged figures should cost no training
    script, arguments, _ = ROWS[name]
    flags = [*arguments.split(), "-log_dir_prefix", str(Path(logs, name)), *more]
    val_ratio = {"val_ratio": 0.15} if script == "train_val.py" else {}
    settings, committed = (config.parse(given, **val_ratio) for given in (flags, arguments.split()))
    if settings.log_dir_prefix != str(Path(logs, name)):
        raise UserError("-log_dir_prefix: each row has a folder of its own; -logs says where these lie")
    fields = dataclasses.asdict(committed)
    may_change = MAY_CHANGE - {"max_epoch"}
    other = [f for f, value in dataclasses.asdict(settings).items() if f not in may_change and value != fields[f]]
    if other:
        raise UserError(f"-{other[0]} would make another run than the row {name}; that is for train.py")
    data.load(settings)  # a data set that is not there should cost no device time
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    script, *own = script.split()
    command = [sys.executable, ROOT / "experiments" / script, *own, *flags]
    code = None
    with _recording() as told:
        # In a session of its own: Ctrl-C reaches this program alone, and a second signal would end the run unsaved.
        program = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        while code is None and not told and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = program.wait(0.5)
        if signal.SIGHUP in told:  # nor is there anywhere to print to
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if code is None:
            program.terminate()
            code = program.wait()
    if code not in (0, 143, -signal.SIGTERM) and signal.SIGHUP not in told:
        # -SIGTERM where it was told before it listened. Of a terminal that is gone it could not say that it had saved.
        raise UserError(f"{name} ended with status {code}; its messages are above")
    if name == "ablation":
        keep_ablation(ablation.asked([*own, *flags]))
    else:
        keep(name, settings)
    write_page()
    if told:
        raise signals.Interrupted(told[0])


@contextlib.contextmanager
def _recording():
    """Records signals, a closed terminal's too, in the list that it gives; none ends this before its run has saved."""
    told, numbers = [], [*signals.SIGNALS]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep(name, settings):
    """Copies a row's figures and picture from its run into docs/results."""
    try:
        result = json.loads((settings.run_dir / "result.json").read_text())
    except OSError:
        return print(f"{name}: no epoch is done yet")
    if result["best"] is None:
        return print(f"{name}: no epoch was tested yet")
    if before := _kept(name):
        if result["samples"] != before["samples"]:
            return print(f"{name}: a run on {before['samples']} samples is kept, this had {result['samples']}")
        if result["epochs"] < before["epochs"]:
            return print(f"{name}: a run of {before['epochs']} epochs is kept, this had {result['epochs']}")
    curves = read_metrics(settings.run_dir)
    curve = dict(curves["test_accuracy"])
    kept = {
        "command": _command(name),
        "after": {str(epoch): curve[epoch - 1] for epoch in EPOCHS if epoch - 1 in curve},
        **{key: result[key] for key in FIGURES},
        "dataset": settings.dataset_name,
        "max_epoch": settings.max_epoch,
    }
    KEPT.mkdir(exist_ok=True)
    _replace(name, kept)
    summary(curves, KEPT / f"{name}.png", title=name, init_tau=settings.init_tau)


def keep_ablation(runs):
    """Keeps table and picture of the ablation's runs that are done, made of these anew: it may have been killed."""
    results = [result for configs in runs.values() for run in configs if (result := ablation.finished(run))]
    if not results:
        return print("ablation: no run is done yet")
    if (before := _kept("ablation")) and len(results) < before["runs"]:
        return print(f"ablation: a table of {before['runs']} runs is kept, this had {len(results)}")
    kept = {"command": _command("ablation"), "table": ablation.told(runs) + "\n", "runs": len(results)}
    kept |= {"seconds": sum(r["seconds"] for r in results)} | {key: results[0][key] for key in HARDWARE}
    _replace("ablation", kept)
    ablation.draw(runs, KEPT / "ablation.png")


def _kept(name):
    """A row's figures; None where none are kept."""
    path = KEPT / f"{name}.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        raise UserError(f"{path} is damaged; take it from git, or delete it and run {name} again") from None


def _replace(name, kept):
    """Writes a row's figures; what a note said of others goes."""
    figures, note = KEPT / f"{name}.json", KEPT / f"{name}.md"
    text = json.dumps(kept, indent=1) + "\n"
    if note.exists() and not (figures.exists() and figures.read_text() == text):
        note.unlink()  # first: killed in between, this would find the figures replaced and keep the note
        print(f"{name}: {note} spoke of the run before and is gone; git has it, for what still holds")
    files.write(figures, text)


def published():
    """The authors' accuracy after some epochs, {data set: {epochs: percent}}, from docs/results/published.csv."""
    with (KEPT / "published.csv").open(newline="") as lines:
        return {row.pop("dataset"): row for row in csv.DictReader(lines)}


def page() -> str:
    """RESULTS.md, from what is kept."""
    kept = {name: row for name in ROWS if (row := _kept(name))}
    theirs = published()
    parts = [(KEPT / "introduction.md").read_text().rstrip()]
    for name, (_, _, what) in ROWS.items():
        note = KEPT / f"{name}.md"
        section = _section(name, what, kept[name], theirs) if name in kept else f"## {name}\n\n{what}."
        if note.exists():
            section += "\n\n" + note.read_text().rstrip()
        elif name not in kept:
            section += " Not run: it takes a GPU, and none was at hand for long enough."
        parts.append(section)
    return "\n\n".join(parts) + "\n"


def write_page():
    """Writes RESULTS.md anew."""
    files.write(ROOT / "RESULTS.md", page())
    print(f"wrote {ROOT / 'RESULTS.md'}")


def _section(name, what, row, theirs):
    head = f"## {name}\n\n{what}.\n\n```sh\n{row['command']}\n```\n\n"
    hardware = _hardware(row)
    if name == "ablation":
        return (
            f"{head}{row['table']}\n{row['runs']} runs, {row['seconds'] / 60:.0f} minutes in all: {hardware}.\n\n"
            "![accuracy and tau over epochs](docs/results/ablation.png)"
        )
    compare = FULL in what
    best, last = row["best"], row["last"]
    epochs = row["epochs"] if row["finished"] else f"{row['epochs']} of {row['max_epoch']} so far"
    samples = ", ".join(f"{n} {part}" for part, n in row["samples"].items())
    header = "| after epochs | " + " | ".join(row["after"]) + " |"
    lines = [header, "|---" * (1 + len(row["after"])) + "|"]
    lines.append(
        "| test accuracy here, % | " + " | ".join(f"{100 * value:.2f}" for value in row["after"].values()) + " |"
    )
    if compare:
        lines.append("| the authors' | " + " | ".join(theirs[row["dataset"]][epoch] for epoch in row["after"]) + " |")
    # Rows that were run before the figure became the mean over a run have that of its last epoch.
    mean, of_last = row.get("samples_per_second"), row.get("samples_per_second_in_last_epoch")
    speed = f"{of_last:.0f} in the last epoch" if of_last is not None else "-" if mean is None else f"{mean:.0f}"
    taus = ", ".join(f"{layer} {row['tau_before'][layer]:.2f} → {tau:.2f}" for layer, tau in row["tau"].items())
    return (
        f"{head}| {row['protocol']}: best | last | epochs | samples | seconds | training samples/s | hardware |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| {best['test_accuracy']:.2%} (epoch {best['epoch']}) | {last['test_accuracy']:.2%} | {epochs} | {samples} | "
        f"{row['seconds']:.0f} | {speed} | {hardware} |\n\n"
        + "\n".join(lines)
        + f"\n\ntau: {taus}.\n\n![accuracy and tau over epochs](docs/results/{name}.png)"
    )


def _command(name):
    script, arguments, _ = ROWS[name]
    return f"python experiments/{script} {arguments}" + " -data_root DATA" * ("configs/digits.py" not in arguments)


def _hardware(row):
    return (
        f"{row['devices'][0].split(' ', 1)[1]} x {len(row['devices'])}; {row['machine']}; JAX {row['versions']['jax']}"
    )


def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"any of {', '.join(ROWS)}")
    parser.add_argument(
        "-minutes", type=float, default=float("inf"), help="wall-clock limit, of which each row has its share"
    )
    parser.add_argument("-logs", default="logs/results", help="folder for the runs (default logs/results)")
    given, more = parser.parse_known_args(argv)
    refuse_unknown(more, [*(field.name for field in dataclasses.fields(config.Config)), "minutes", "logs"])
    if not given.minutes > 0:
        raise UserError(f"-minutes {given.minutes}: give a number of minutes above 0")
    if more and not given.rows:
        raise UserError(f"{more[0]} is for a run; before all flags give any of {', '.join(ROWS)}")
    unknown = [row for row in given.rows if row not in ROWS]
    if unknown:
        raise UserError(f"no row is called {unknown[0]}; before all flags give any of {', '.join(ROWS)}")
    deadline = time.monotonic() + 60 * given.minutes
    for i, name in enumerate(given.rows):
        left = deadline - time.monotonic()
        if left > 0:
            run(name, more, given.logs, time.monotonic() + left / (len(given.rows) - i))
        else:
            print(f"{name}: no time is left for it")
    if not given.rows:
        write_page()


if __name__ == "__main__":
    cli.run(main)
