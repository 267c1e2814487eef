"""The Python of the README and of the guide runs as printed, and every file that the README names is there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_notebook_snippets_run_and_show_what_they_say():
    matplotlib.use("Agg")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, names)
    # tau = 2 and a current of 1.3: v = 0.65, 0.975, 1.1375 -> a spike every third timestep.
    assert np.flatnonzero(np.asarray(names["neuron"](names["current"]))[:, 0]).tolist() == list(range(2, 40, 3))
    np.testing.assert_allclose(np.ravel(names["membrane"])[:3], [0.65, 0.975, 0.0], atol=1e-6)
    assert names["rates"].shape == (1, 10) and names["votes"].shape == (1, 1, 10)


def test_a_loop_of_ones_own_runs_as_printed():
    names = {}
    section = (ROOT / "docs" / "tools.md").read_text().partition("## A loop of your own")[2]
    for block in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(block, names)
    net, before = names["net"], jax.tree.map(jnp.array, nnx.state(names["net"], nnx.Param))
    names["optimizer"].update(net, jax.tree.map(jnp.zeros_like, before))
    decayed = jax.tree.map(lambda was, now: (was != now).any(), before, nnx.state(net, nnx.Param))
    assert decayed.conv[0].kernel[...] and not any(neuron.w[...] for neuron in (decayed.conv[2], decayed.fc[3]))
    np.testing.assert_array_equal(names["votes"][:, 0], net.unroll(None, names["frames"])[1])


def test_files_that_the_readme_names_exist():
    named = re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"(?:experiments|configs)/\w+\.py", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing
