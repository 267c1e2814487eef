"""Accuracy-A: trains on the training set, tests after every epoch, reports the best and the last test accuracy.

    python experiments/train.py -config configs/nmnist.py -data_root DATA -max_epoch 10
    python experiments/train.py -init_tau 2.0 -use_max_pool -use_plif -detach_reset -dataset_name MNIST -T 8

The same command again continues a stopped run. -h lists the flags.
"""

from plif_jax import cli, config
from plif_jax.errors import UserError
from plif_jax.training.loop import train


def main(argv):
    settings = config.parse(argv, __doc__)
    if settings.val_ratio is not None:
        raise UserError(
            f"-val_ratio {settings.val_ratio}: only accuracy-B keeps samples for validation; use train_val.py"
        )
    train(settings)


if __name__ == "__main__":
    cli.run(main)
