"""Accuracy-B: keeps 15 % of each class for validation, reports the test accuracy of the best validated epoch.

    python experiments/train_val.py -init_tau 2.0 -use_max_pool -use_plif -detach_reset -dataset_name MNIST -T 8

The same command again continues a stopped run. -h lists the flags.
"""

from plif_jax import cli, config
from plif_jax.errors import UserError
from plif_jax.training.loop import train


def main(argv):
    settings = config.parse(argv, __doc__, val_ratio=0.15)
    if settings.val_ratio is None:
        raise UserError("-val_ratio None: without validation it is accuracy-A, which train.py trains; give a share")
    train(settings)


if __name__ == "__main__":
    cli.run(main)
