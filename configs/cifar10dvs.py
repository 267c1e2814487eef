"""The paper's CIFAR10-DVS run: PLIF, tau0 = 2, max pooling, T = 20.

    python experiments/train.py -config configs/cifar10dvs.py -data_root DATA
    python experiments/train_val.py -config configs/cifar10dvs.py -data_root DATA

The paper reports 74.80 % (accuracy-A) and 69.00 % (accuracy-B) after 1024 epochs. Here it has not been run,
for it takes a GPU, nor has its speed on one been measured.
"""

from plif_jax.config import Config

config = Config(
    dataset_name="CIFAR10DVS",
    init_tau=2.0,
    use_plif=True,
    use_max_pool=True,
    detach_reset=True,
    T=20,
    channels=128,
    number_layer=4,
    max_epoch=1024,
)
