"""The quickstart: scikit-learn's digits seen by a simulated event camera, a narrow N-MNIST network. No download.

    make quickstart
    python experiments/train.py -config configs/digits.py

One to two minutes on two CPU cores: 97.46 % at best, 96.90 % after the last epoch (RESULTS.md); another CPU
rounds otherwise.
"""

from plif_jax.config import Config

config = Config(
    dataset_name="Digits",
    init_tau=2.0,
    use_plif=True,
    use_max_pool=True,
    detach_reset=True,
    T=10,
    channels=16,
    number_layer=2,
    learning_rate=3e-3,
    max_epoch=12,
    T_max=12,
)
