"""The paper's N-MNIST run: PLIF, tau0 = 2, max pooling, T = 10, 128 channels.

    python experiments/train.py -config configs/nmnist_paper.py -data_root DATA
    python experiments/train_val.py -config configs/nmnist_paper.py -T 20 -data_root DATA

The paper reports 99.61 % (accuracy-A) and 99.57 % (accuracy-B, T = 20) after 1024 epochs. Here it has not been run,
for it takes a GPU: on an NVIDIA H200 training steps alone process 11 500 samples per second (docs/performance.md).
"""

from plif_jax.config import Config

config = Config(
    dataset_name="NMNIST",
    init_tau=2.0,
    use_plif=True,
    use_max_pool=True,
    detach_reset=True,
    T=10,
    channels=128,
    number_layer=2,
    max_epoch=1024,
)
