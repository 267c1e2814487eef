"""The paper's ablation: PLIF or LIF, tau 2 or 16, maximum or average pooling; for some data sets and seeds.

    python experiments/ablation.py -datasets MNIST FashionMNIST -seeds 2020 2021 -max_epoch 64 -data_root DATA

All other flags are those of train.py, and with -val_ratio 0.15 those of train_val.py. Runs lie under
{log_dir_prefix}/seed_{seed}. The same command again skips what is done, continues what was stopped, and prints the
table: per cent, mean and deviation over seeds, beside the published figure, and what else differs from the published
runs. Writes ablation.md and ablation.png.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import jax

from plif_jax import cli, data, files
from plif_jax.analysis import reference
from plif_jax.catalog import DATASETS
from plif_jax.config import Config, Parser, expanded, parse
from plif_jax.curves import COLORS, epoch_axis, figure, line, tau_over_epochs
from plif_jax.errors import UserError
from plif_jax.training import signals
from plif_jax.training.checkpoint import MAY_CHANGE
from plif_jax.training.logs import read_metrics
from plif_jax.training.loop import train

SETTINGS = {
    "PLIF, tau0 = 2": dict(use_plif=True, init_tau=2.0, use_max_pool=True),
    "PLIF, tau0 = 16": dict(use_plif=True, init_tau=16.0, use_max_pool=True),
    "LIF, tau = 2": dict(use_plif=False, init_tau=2.0, use_max_pool=True),
    "LIF, tau = 16": dict(use_plif=False, init_tau=16.0, use_max_pool=True),
    "PLIF, tau0 = 2, average pool": dict(use_plif=True, init_tau=2.0, use_max_pool=False),
}
# Accuracies in percent (Fang et al., 2021), in the order of SETTINGS; of accuracy-B only the first was published.
PUBLISHED_A = {
    "MNIST": (99.72, 99.73, 99.69, 99.49, 99.71),
    "FashionMNIST": (94.38, 94.65, 94.17, 94.47, 94.74),
    "CIFAR10": (93.50, 93.23, 93.03, 47.50, 93.30),
    "NMNIST": (99.61, 99.53, 99.64, 99.15, 99.66),
    "CIFAR10DVS": (74.80, 70.50, 73.60, 62.40, 72.70),
    "DVS128Gesture": (97.57, 92.01, 96.88, 76.74, 97.22),
}
PUBLISHED_B = {
    "MNIST": (99.63,),
    "FashionMNIST": (93.85,),
    "CIFAR10": (92.58,),
    "NMNIST": (99.57,),
    "CIFAR10DVS": (69.00,),
    "DVS128Gesture": (96.53,),
}
OURS_TO_SET = {"dataset_name", "init_tau", "use_plif", "use_max_pool", "seed"}


def plan(datasets, seeds, flags):
    """The settings of every run, {(data set, name of the setting): [config of each seed]}.

    Raises:
      UserError: a flag that train.py would refuse too.
    """
    runs = {}
    for dataset in datasets:
        base = parse(flags, __doc__, dataset_name=dataset, detach_reset=True)
        if base.dataset_name != dataset:
            raise UserError(f"-config is for {base.dataset_name}, -datasets names {dataset}; give the one or the other")
        for name, setting in SETTINGS.items():
            runs[dataset, name] = [
                dataclasses.replace(base, seed=s, log_dir_prefix=str(Path(base.log_dir_prefix, f"seed_{s}")), **setting)
                for s in dict.fromkeys(seeds)
            ]
    return runs


def finished(run: Config):
    """The result of a run that is done, with these settings and as many epochs; None otherwise."""
    asked = {name: value for name, value in dataclasses.asdict(run).items() if name not in MAY_CHANGE}
    try:
        result = json.loads((run.run_dir / "result.json").read_text())
        same = asked.items() <= result["settings"].items() and result["epochs"] >= run.max_epoch and result["best"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # none, or damaged: written anew
        return None
    return result if same else None


def spread(values):
    """Mean and sample deviation of accuracies, in percent; the deviation only where there are two or more."""
    percent = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.2f}{deviation}"


def table(runs) -> str:
    """What is done so far as a Markdown table."""
    lines = [
        "| data set | setting | published | best | last | seeds | epochs |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dataset, name), configs in runs.items():
        published = PUBLISHED_A if configs[0].val_ratio is None else PUBLISHED_B
        figures = dict(zip(SETTINGS, published.get(dataset, ()), strict=False))
        theirs = f"{figures[name]:.2f}" if name in figures else "-"
        results = [result for run in configs if (result := finished(run))]
        ours = [spread([r[which]["test_accuracy"] for r in results]) if results else "-" for which in ("best", "last")]
        epochs = sorted({r["epochs"] for r in results})
        cells = [dataset, name, theirs, *ours, str(len(results)), ", ".join(map(str, epochs)) or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(runs) -> list[str]:
    """What sets the runs of each data set apart from the published ones, a line each."""
    lines = []
    for (dataset, name), (config, *_) in runs.items():
        if name != next(iter(SETTINGS)) or dataset not in PUBLISHED_A:
            continue
        whole = Config(dataset_name=dataset, detach_reset=True, **SETTINGS[name])
        published = whole.run_name if config.val_ratio is None else reference.accuracy_b_name(dataset)
        differing = reference.differences(config, published)
        if config.max_epoch != whole.max_epoch:
            differing.append(f"max_epoch is {config.max_epoch}, theirs {whole.max_epoch}")
        results = [finished(run) for (other, _), configs in runs.items() for run in configs if other == dataset]
        parts = [reference.parts_used(result["samples"], dataset) for result in results if result]
        differing += dict.fromkeys(part for of_run in parts for part in of_run)
        lines += [f"note: {dataset}: {difference}" for difference in differing]
    return lines


def mean_metrics(configs):
    """Each curve's mean over the seeds that are done, at the steps that all have."""
    metrics = [read_metrics(run.run_dir) for run in configs if finished(run)]
    mean = {}
    for tag in metrics[0] if metrics else ():
        curves = [dict(m[tag]) for m in metrics]
        steps = sorted(set.intersection(*map(set, curves)))
        mean[tag] = [(step, statistics.mean(curve[step] for curve in curves)) for step in steps]
    return mean


def draw(runs, path):
    """Four panels for each data set: accuracy of every setting, and tau of every layer for each PLIF setting."""
    datasets = list(dict.fromkeys(dataset for dataset, _ in runs))
    learned = [name for name, setting in SETTINGS.items() if setting["use_plif"]]
    fig, axes = figure(2 * len(datasets), 2, width=11, height=8 * len(datasets), squeeze=False)
    for row, dataset in zip(axes.reshape(-1, 4), datasets, strict=True):
        for name, color in zip(SETTINGS, COLORS, strict=False):
            if test := mean_metrics(runs[dataset, name]).get("test_accuracy"):
                epochs, accuracy = zip(*test, strict=True)
                row[0].plot([e + 1 for e in epochs], [100 * a for a in accuracy], label=name, **line(epochs, color))
        row[0].set(title=dataset, ylabel="test accuracy (%), mean over seeds")
        epoch_axis(row[0])
        if row[0].lines:
            row[0].legend(fontsize="small")
        for ax, name in zip(row[1:], learned, strict=True):
            tau_over_epochs(ax, mean_metrics(runs[dataset, name]), SETTINGS[name]["init_tau"])
            ax.set_title(f"{dataset}: {name}; of the mean w over seeds", fontsize="medium")
    files.write_figure(fig, path)


def asked(argv):
    """The runs that a command line asks for, as `plan` gives them."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("-datasets", nargs="+", choices=list(DATASETS), required=True, help="one after the other")
    parser.add_argument("-seeds", nargs="+", type=int, default=[2020], help="a run for each (default 2020)")
    for flag in argv:  # before argparse, which takes -seed for -seeds
        if flag.startswith("-") and flag.lstrip("-").split("=")[0] in OURS_TO_SET:
            raise UserError(f"{flag}: the ablation sets it; choose with -datasets and -seeds")
    chosen, flags = parser.parse_known_args(argv)
    return plan(chosen.datasets, chosen.seeds, flags)


def told(runs) -> str:
    """The table, and what sets the runs apart."""
    return "\n\n".join([table(runs), *notes(runs)])


def main(argv):
    runs = asked(argv)
    folder = expanded(next(iter(runs.values()))[0].log_dir_prefix).parent
    with signals.ending():  # while it trains, `train` listens in its own way
        try:
            fill(runs)
        finally:
            text, path = told(runs), folder / "ablation.md"
            print(f"\n{text}")
            # Not without a finished run, where the call was refused say: the folder may be none that can be written.
            if any(finished(run) for configs in runs.values() for run in configs):
                files.write(path, text + "\n")
                draw(runs, path.with_suffix(".png"))
                print(f"\n{path}, {path.with_suffix('.png')}")


def fill(runs):
    """Trains what is not done."""
    unfinished = {dataset: run for (dataset, _), configs in runs.items() for run in configs if not finished(run)}
    for run in unfinished.values():
        data.load(run)  # a data set that is not there should not cost the training of those before it
    for (dataset, name), configs in runs.items():
        for run in configs:
            done = finished(run)
            print(f"\n== {dataset}, {name}, seed {run.seed}{': done' if done else ''}", flush=True)
            if not done:
                train(run)
                jax.clear_caches()  # JAX would keep every run's programs


if __name__ == "__main__":
    cli.run(main)
