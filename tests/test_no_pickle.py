"""Nothing that a user downloads is executed: what the sources may not contain, and what the exceptions are."""

import ast
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from plif_jax.data import archives, image_files
from plif_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("plif_jax", "experiments", "configs", "notebooks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".ipynb")
)
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# What the search knows by these names, and `np.load`, alone.
KNOWN = {"torch.load", "numpy.load", "os.system"}
# Opens the official CIFAR-10 files alone, known by checksum, with an Unpickler that rebuilds arrays only.
MAY_UNPICKLE = {"plif_jax/data/image_files.py"}
# The config of `-config FILE` is the user's own program.
MAY_EXECUTE = {"plif_jax/config.py"}


def offences(tree, name):
    """The calls and imports in a module by which bytes could become actions."""
    for node in ast.walk(tree):
        modules = _imported(node)
        if modules & UNPICKLERS and name not in MAY_UNPICKLE:
            yield f"imports {modules & UNPICKLERS}"
        if _renames(node):
            yield f"calls what unpickles or executes by another name: {ast.unparse(node)}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        in_place = called in ("np.load", "numpy.load") and len(node.args) > 2
        if in_place or given.get("allow_pickle", "False") != "False":
            yield f"allows NumPy to unpickle: {ast.unparse(node)}"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"unpickles: {ast.unparse(node)}"
        if called in ("pickle.load", "pickle.loads", "pickle.Unpickler") or called.endswith("read_pickle"):
            yield f"unpickles: {ast.unparse(node)}"
        if called in ("eval", "exec", "os.system") or (called.endswith("exec_module") and name not in MAY_EXECUTE):
            yield f"executes: {ast.unparse(node)}"
        if given.get("shell", "False") != "False":
            yield f"starts a shell: {ast.unparse(node)}"
        if called.endswith(".extractall") and not (
            given.get("filter") == "'data'" or name == "plif_jax/data/archives.py"
        ):
            yield f"unpacks what may leave its folder: {ast.unparse(node)}"


def _imported(node):
    """The top-level modules that a statement or call imports."""
    modules = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and node.args:
        modules = [ast.unparse(node.args[0]).strip("'")]
    return {module.partition(".")[0] for module in modules}


def _renames(node):
    """Whether a statement makes a known function callable by another name."""
    if isinstance(node, ast.ImportFrom):
        return bool(KNOWN & {f"{node.module}.{alias.name}" for alias in node.names})
    return isinstance(node, ast.Import) and any(alias.name == "torch" and alias.asname for alias in node.names)


def source(path):
    """The program of a module or notebook."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_executes(path):
    name = path.relative_to(ROOT).as_posix()
    assert not list(offences(ast.parse(source(path)), name))


def test_the_notebooks_are_searched(tmp_path):
    assert sum(path.suffix == ".ipynb" for path in SOURCES) == 5
    cells = [("markdown", ["# Load"]), ("code", ["import os\n", "eval(x)"])]
    notebook = {"cells": [{"cell_type": kind, "source": lines} for kind, lines in cells]}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook))
    assert list(offences(ast.parse(source(tmp_path / "a.ipynb")), "a.ipynb"))


@pytest.mark.parametrize(
    "line",
    [
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "import pickle",
        "import dill.source",
        "import_module('pickle')",
        "importlib.import_module('pickle')",
        "__import__('pickle')",
        "from torch import Tensor, load",
        "from os import system",
        "import torch as t",
        "pandas.read_pickle(path)",
        "from pickle import loads",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "spec.loader.exec_module(module)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert list(offences(ast.parse(line), "plif_jax/data/other.py"))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_the_restricted_unpickler_calls_nothing_else(tmp_path):
    """Even past the checksum."""
    with pytest.raises(UserError, match="asks for"):
        image_files._BatchUnpickler(io.BytesIO(pickle.dumps(Malicious(tmp_path / "run"))), encoding="bytes").load()
    assert not (tmp_path / "run").exists()
    assert issubclass(image_files._BatchUnpickler, pickle.Unpickler)
    assert {name for _, name in image_files._PICKLE_MAY_CALL} == {"_reconstruct", "ndarray", "dtype"}


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_weights_that_run_something_are_refused(tmp_path, suffix):
    from plif_jax.interop import torch_files

    path = tmp_path / f"weights{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        entry = "weights/data.pkl" if suffix == ".pt" else "a.npy"
        content = pickle.dumps({"net": Malicious(tmp_path / "run")}, protocol=2)
        header = (
            b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
        )
        archive.writestr(entry, content if suffix == ".pt" else header + content)
    with pytest.raises(UserError):
        torch_files.read(path)
    assert not (tmp_path / "run").exists()


def zip_of(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "out")


def tar_of(path, name, link):
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, link
        archive.addfile(member, io.BytesIO())


@pytest.mark.parametrize(
    "suffix, write",
    [
        (".zip", lambda path: zip_of(path, "/escaped")),
        (".tar", lambda path: tar_of(path, "link", "../..")),
        (".tar", lambda path: tar_of(path, "link", "/etc")),
    ],
)
def test_an_archive_cannot_leave_its_folder(tmp_path, suffix, write):
    path = tmp_path / f"data{suffix}"
    write(path)
    with pytest.raises(UserError):
        archives.unpacked(path, tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped")) and not Path("/escaped").exists()
    assert not list((tmp_path / "cache" / "unpacked").glob("data-*[!k]"))
