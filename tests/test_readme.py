"""The README's Python runs as printed, and every file that it names is there."""

import pathlib
import re

import matplotlib
import numpy as np

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


def test_files_that_the_readme_names_exist():
    named = re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"(?:experiments|configs)/\w+\.py", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing
