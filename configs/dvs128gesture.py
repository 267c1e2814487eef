"""The paper's DVS128 Gesture run: PLIF, tau0 = 2, max pooling, T = 20.

    python experiments/train.py -config configs/dvs128gesture.py -data_root DATA
    python experiments/train_val.py -config configs/dvs128gesture.py -data_root DATA

The paper reports 97.57 % (accuracy-A) and 96.53 % (accuracy-B) after 1024 epochs. Here it has not been run,
for it takes a GPU: on an NVIDIA H200 training steps alone process 790 samples per second (docs/performance.md).
"""

from plif_jax.config import Config

config = Config(
    dataset_name="DVS128Gesture",
    init_tau=2.0,
    use_plif=True,
    use_max_pool=True,
    detach_reset=True,
    T=20,
    channels=128,
    number_layer=5,
    max_epoch=1024,
)
