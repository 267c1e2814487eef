"""Lays a run's curves over published ones of the same settings, and prints the differences.

    python experiments/compare.py logs/MNIST_init_tau_2.0_... --reference AUTHORS_LOGS

AUTHORS_LOGS is the folder `logs` of the paper's repository (TensorBoard event files), or curves exported from it as
CSV. Prints, after 1, 5, 10, 32, 64, ... epochs, the run's accuracy, the published one and the difference, and the same
of w of each layer, with the tau that it means; writes compare.png into the run folder, or into -out.
"""

import json
from pathlib import Path

from plif_jax import cli
from plif_jax.analysis import reference
from plif_jax.config import Config, Parser
from plif_jax.curves import (
    COLORS,
    accuracy_over_epochs,
    figure,
    infer_steps_per_epoch,
    line,
    run_title,
    shades,
    tau_of,
    tau_over_epochs,
    w_tags,
)
from plif_jax.data.storage import writing
from plif_jax.errors import UserError
from plif_jax.files import write_figure
from plif_jax.training.logs import read_metrics


def print_accuracy(ours, theirs):
    """A line for each epoch of interest; the difference in percentage points."""
    for tag in ("test_accuracy", "val_accuracy"):
        rows = reference.differences_at(ours.get(tag, ()), theirs.get(tag, ()))
        if rows:
            print(f"\n{tag:<15}{'ours':>8}{'theirs':>9}{'difference':>12}")
        for epochs, mine, published in rows:
            print(f"after {epochs:>5}    {mine:>8.2%}{published:>9.2%}{100 * (mine - published):>+z12.2f}")


def per_epoch(metrics, tag):
    """A curve logged at steps, after every epoch, as a curve over epochs counted from 0.

    In the authors' CIFAR-10 run the steps ran ahead where it was resumed: its w is that of an epoch before from about
    epoch 91 on, and of three epochs before at the end.
    """
    steps = infer_steps_per_epoch(metrics)
    return [(step // steps - 1, value) for step, value in metrics.get(tag, ())]


def print_w(ours, theirs):
    """A line for each epoch of interest and layer: w, and the tau that it means."""
    for tag in w_tags(ours):
        rows = reference.differences_at(per_epoch(ours, tag), per_epoch(theirs, tag))
        if rows:
            heading = f"w of layer {int(tag[1:]) + 1}"
            print(f"\n{heading:<15}{'ours':>8}{'theirs':>9}{'difference':>12}{'tau: ours':>12}{'theirs':>9}")
        for epochs, mine, published in rows:
            values = f"{mine:>z8.3f}{published:>z9.3f}{mine - published:>+z12.3f}"
            print(f"after {epochs:>5}    {values}{tau_of(mine):>12.3f}{tau_of(published):>9.3f}")


def parts_used(run, config):
    """How much of the data set the run had, where that was not all; so far as its result is written."""
    try:
        samples = json.loads((run / "result.json").read_text())["samples"]
        return reference.parts_used(samples, config.dataset_name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _up_to(epoch, curve):
    """The part of a curve that we have too; one point at least."""
    return [point for point in curve if point[0] <= epoch] or curve[:1]


def draw(ours, theirs, init_tau, name, path):
    """Both runs' accuracy and, where both learned it, tau from the start that they share; theirs thin."""
    taus = w_tags(ours) and w_tags(theirs)
    last = max(ours["test_accuracy"])[0]
    fig, axes = figure(1, 2 if taus else 1, width=11 if taus else 6.4, squeeze=False)
    ax = accuracy_over_epochs(axes[0, 0], ours)
    for tag, color in (("val_accuracy", COLORS[4]), ("test_accuracy", "gray")):
        if tag in theirs:
            label = f"theirs, {tag.split('_')[0]}"
            epochs, values = zip(*_up_to(last, theirs[tag]), strict=True)
            ax.plot([e + 1 for e in epochs], [100 * v for v in values], label=label, **line(epochs, color, thin=True))
    ax.legend()
    if taus:
        ax = tau_over_epochs(axes[0, 1], ours, init_tau)
        for tag, color in zip(w_tags(theirs), shades(len(w_tags(theirs))), strict=True):
            epochs, w = zip(*_up_to(last, per_epoch(theirs, tag)), strict=True)
            curve = [init_tau, *tau_of(w)]
            ax.plot([0, *(e + 1 for e in epochs)], curve, "--", **line(curve, color, thin=True))
        ax.set_title("thin, dashed: theirs", fontsize="medium")
    run_title(fig, name)
    write_figure(fig, path)


def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("-reference", type=Path, required=True, help="folder with published curves")
    parser.add_argument("-out", type=Path, help="folder for compare.png (default RUN)")
    flags = parser.parse_args(argv)
    ours = read_metrics(flags.run)
    if "test_accuracy" not in ours:
        raise UserError(f"{flags.run} has no test accuracy yet: it is there after the first epoch that is evaluated")
    try:
        config = Config.of_run(flags.run)
    except OSError:
        raise UserError(f"{flags.run} is not the folder of a run: it has no config.json") from None
    published = reference.load(flags.reference, config, besides=flags.run)
    print(f"ours   {config.run_name}\ntheirs {published.run_name}")
    for difference in [*published.differences, *parts_used(flags.run, config)]:
        print(f"note:  {difference}")
    if not reference.differences_at(ours["test_accuracy"], published.metrics.get("test_accuracy", ())):
        print("note:  no epoch has a test accuracy both here and there: there is nothing to compare")
    theirs = published.metrics
    layers, their_layers = len(w_tags(ours)), len(w_tags(theirs))
    if layers and their_layers and layers != their_layers:
        print(f"note:  {layers} layers have a w, theirs {their_layers}: they are not the same ones, w is not compared")
        theirs = {tag: curve for tag, curve in theirs.items() if tag not in w_tags(theirs)}
    print_accuracy(ours, theirs)
    print_w(ours, theirs)
    path = (flags.out or flags.run) / "compare.png"
    with writing(path, "Give another folder with -out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(ours, theirs, config.init_tau, config.run_name, path)
    print(f"\npicture {path}")


if __name__ == "__main__":
    cli.run(main)
