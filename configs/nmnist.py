"""N-MNIST on a small machine: the paper's protocol with 16 channels instead of 128.

    python experiments/train.py -config configs/nmnist.py -data_root DATA
    python experiments/train_val.py -config configs/nmnist.py -data_root DATA

Made for the first 1000 training and 100 test recordings, with a learning rate to match: 50 seconds on two CPU cores for
95 % (accuracy-A), 44 for 93 % (accuracy-B; RESULTS.md). configs/nmnist_paper.py has the paper's settings.
"""

from plif_jax.config import Config

config = Config(
    dataset_name="NMNIST",
    init_tau=2.0,
    use_plif=True,
    use_max_pool=True,
    detach_reset=True,
    T=10,
    channels=16,
    number_layer=2,
    learning_rate=3e-3,
    max_epoch=15,
    T_max=15,
)
