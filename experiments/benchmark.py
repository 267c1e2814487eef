"""Measures plif_jax against SpikingJelly, tonic and the machine's own limits; every figure is a ratio.

    pip install -e ".[bench]"
    python experiments/benchmark.py all
    python experiments/benchmark.py train -networks MNIST,NMNIST -batch_sizes 16,64 -precisions float32,bfloat16
    python experiments/benchmark.py pipeline -pipeline_network MNIST -data_root DATA

Prints a table and writes benchmark.json and benchmark.png into -out. On a machine that does other work besides, ask
for more -rounds: peers run in turn, and ratios are taken round by round.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import report, suites
from bench.machine import machine
from plif_jax import cli
from plif_jax.config import Parser
from plif_jax.errors import UserError
from plif_jax.networks import NETWORKS
from plif_jax.training import signals

SUITES = ("neuron", "train", "infer", "frames", "pipeline", "memory")
RECORDINGS = (
    ("N-MNIST", 10, {"events": 4_000, "height": 34, "width": 34}),
    ("DVS128 Gesture", 20, {"events": 400_000, "height": 128, "width": 128}),
)


BACKENDS, MODES = ("auto", "torch", "cuda", "triton"), ("multi-step", "single-step")
PRECISIONS = ("float32", "bfloat16")


def _names(*allowed):
    """Parses names with commas between them."""

    def parse(text):
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"there is no {name!r}; give any of {','.join(allowed)}")
        return names

    return parse


def _numbers(text, *words):
    """Parses whole numbers from 1 with commas between them, or words."""
    return [item if item in words else _number(item, text) for item in text.split(",")]


def _number(item, text=None):
    """Parses a whole number from 1."""
    if not item.isdecimal() or int(item) < 1:
        several = " with commas between them" if text else ""
        raise argparse.ArgumentTypeError(f"{text or item!r}: give whole numbers from 1{several}")
    return int(item)


def parser():
    """The command line."""
    flags = Parser(description=__doc__)
    flags.add_argument("suite", choices=(*SUITES, "all"))
    flags.add_argument(
        "-peer_python", default=sys.executable, help="interpreter that has torch and spikingjelly (default: this one)"
    )
    flags.add_argument("-rounds", type=_number, default=7, help="runs of each peer (default 7)")
    flags.add_argument(
        "-limit", type=float, default=120, help="seconds after which a case starts no further round (default 120)"
    )
    flags.add_argument(
        "-backends",
        type=_names(*BACKENDS),
        help="of SpikingJelly's neuron, on a GPU (default: its own choice, of neuron torch,cuda,triton)",
    )
    flags.add_argument(
        "-modes", type=_names(*MODES), default=MODES, help="of SpikingJelly in train, infer (default both)"
    )
    flags.add_argument(
        "-out",
        default="logs/benchmark",
        help="folder for benchmark.json and benchmark.png, which each call replaces (default logs/benchmark)",
    )
    flags.add_argument(
        "-neurons", type=_number, help="N of neuron; default: MNIST's first layer at batch 16, on a GPU at batch 64"
    )
    flags.add_argument(
        "-timesteps", type=_numbers, default=[4, 8, 16, 32], help="T of neuron and memory (default 4,8,16,32)"
    )
    flags.add_argument(
        "-networks",
        type=_names(*NETWORKS),
        help="of train, infer, memory (default MNIST,FashionMNIST,NMNIST, on a GPU the paper's six)",
    )
    flags.add_argument(
        "-batch_sizes",
        type=lambda text: _numbers(text, "largest"),
        help="numbers, or on a GPU also: largest (default 16, on a GPU 16,largest)",
    )
    flags.add_argument(
        "-precisions", type=_names(*PRECISIONS), help="float32, bfloat16 (default float32, on a GPU both)"
    )
    flags.add_argument(
        "-pipeline_network", choices=NETWORKS, default="Digits", help="data set of pipeline (default Digits)"
    )
    flags.add_argument("-data_root", default=None, help="folder with that data set")
    flags.add_argument("-train_samples", type=_number, default=1024, help="of pipeline (default 1024)")
    flags.add_argument("-test_samples", type=_number, default=256, help="of pipeline (default 256)")
    return flags


def main(argv=None):
    """Runs the suites asked for; returns the table's rows."""
    asked = parser().parse_args(argv)
    # In a process of its own: JAX in this one would hold the device that the peers are to share.
    find = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True)
    told = found.stderr.splitlines()
    errors = [line for line in told if re.match(r"[\w.]+Error: .", line)]
    if found.returncode:
        why = (errors or told or [f"status {found.returncode}"])[-1]
        raise UserError(f"JAX does not start with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {why}")
    backend = found.stdout.strip()
    gpu = backend == "gpu"
    batches = asked.batch_sizes or ([16, "largest"] if gpu else [16])
    precisions = asked.precisions or (PRECISIONS if gpu else ["float32"])
    if "largest" in batches and not gpu:
        raise UserError("-batch_sizes largest: only a GPU says when its memory is full; give numbers")
    if shutil.which(asked.peer_python) is None:
        raise UserError(f"-peer_python {asked.peer_python}: there is no such program")
    try:  # what cannot be written should not have been measured first
        Path(asked.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=asked.out).close()
    except OSError as error:
        raise UserError(f"-out {asked.out} cannot be written: {error.strerror}") from None
    networks = asked.networks or ["MNIST", "FashionMNIST", "NMNIST"]
    if gpu and not asked.networks:
        networks += ["CIFAR10", "CIFAR10DVS", "DVS128Gesture"]
    here = machine()
    print(f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, load {here['load']:.1f}; JAX on {backend}")
    if errors:  # an accelerator's, which JAX goes on without
        print(f"JAX could not start all it found: {errors[-1]}")
    if here["load"] > here["cores"] / 4:
        print("other programs are running: PyTorch's threads then wait for one another, and ratios flatter us")
    print(f"{report.LEGEND}\n{report.HEADER}")

    def say(row):
        print(report.line(row), flush=True)

    bench = suites.Bench(sys.executable, asked.peer_python, asked.rounds, asked.limit, gpu, asked.backends, say)
    rates = {"names": networks, "batches": batches, "precisions": precisions, "modes": asked.modes}
    calls = {
        "neuron": lambda: suites.neuron(bench, Ts=asked.timesteps, N=asked.neurons or 1_605_632 * (4 if gpu else 1)),
        "train": lambda: suites.train(bench, **rates),
        "infer": lambda: suites.infer(bench, **rates),
        "frames": lambda: suites.frames(bench, recordings=RECORDINGS),
        "pipeline": lambda: suites.pipeline(
            bench,
            name=asked.pipeline_network,
            data_root=asked.data_root,
            train_samples=asked.train_samples,
            test_samples=asked.test_samples,
        ),
        "memory": lambda: suites.memory(bench, names=networks, Ts=asked.timesteps),
    }

    with signals.ending():
        try:
            for suite in SUITES if asked.suite == "all" else [asked.suite]:
                calls[suite]()
        finally:  # Ctrl-C and SIGTERM keep what was measured
            if bench.rows:
                print(*report.ran_on(bench.peers), sep="\n")
                print(f"wrote {asked.out}/{report.write(asked.out, here, bench.rows, bench.peers)}")
            if any("No module named" in row.get("reason", "") for row in bench.rows):
                print(
                    'pip install -e ".[bench]" brings SpikingJelly and PyTorch; or name their interpreter, -peer_python'
                )
    return bench.rows


if __name__ == "__main__":
    cli.run(main)
