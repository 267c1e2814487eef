"""ASL-DVS, 24 letters at 180 x 240: a network and settings of ours, which the paper does not have.

    python experiments/train.py -config configs/asldvs.py -data_root DATA
    python experiments/train_val.py -config configs/asldvs.py -data_root DATA

It has not been run: no accuracy and no time is known. It takes a GPU, and 174 GB of disk for its prepared frames.
"""

from plif_jax.config import Config

config = Config(
    dataset_name="ASLDVS",
    init_tau=2.0,
    use_plif=True,
    use_max_pool=True,
    detach_reset=True,
    T=20,
    channels=128,
    number_layer=5,
    max_epoch=64,
)
