"""Tests a run's best checkpoint: accuracy, accuracy per class, confusion matrix, firing rate per layer.

python experiments/evaluate.py logs/RUN
python experiments/evaluate.py logs/RUN -checkpoint latest -data_root DATA
"""

from plif_jax import cli
from plif_jax.config import Parser
from plif_jax.training.checkpoint import load_checkpoint
from plif_jax.training.evaluation import evaluate


def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("-checkpoint", choices=("best", "latest"), default="best", help="of the run")
    parser.add_argument("-data_root", help="folder with data sets, if not the one of the training")
    parser.add_argument("-cache_dir", help="folder of prepared data, if not the one of the training")
    given = parser.parse_args(argv)
    config, net, checkpoint = load_checkpoint(given.run, given.checkpoint)
    config = config.elsewhere(given.data_root, given.cache_dir)
    figures = evaluate(config, net)

    print(f"{config.run_name}, {checkpoint}, {figures['samples']} test samples")
    print(f"accuracy  {figures['accuracy']:.2%}\n")
    names = [
        f"{label:>2} {name}" if config.facts.names else f"{name:>2}"
        for label, name in enumerate(config.facts.class_names)
    ]
    width = max(5, *map(len, names))
    print(f"{'class':<{width}}  accuracy  predicted as " + " ".join(f"{label:>5}" for label in range(len(names))))
    for name, share, row in zip(names, figures["per_class"], figures["confusion"], strict=True):
        of_class = f"{share:.2%}" if sum(row) else "-"
        print(f"{name:<{width}}  {of_class:>8}               " + " ".join(f"{n:>5}" for n in row))
    print("\nlayer     firing rate (spikes per neuron and timestep)")
    for name, rate in figures["firing_rates"].items():
        print(f"{name:<9} {rate:.4f}")


if __name__ == "__main__":
    cli.run(main)
