"""The suites: which peers run what, and which ratios are told."""

import contextlib
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bench.peers import Peer, PeerError, in_turn
from bench.ratios import Target, missing, row
from plif_jax.catalog import DATASETS

# So many events make one run of frames: a short recording is integrated over and over.
FRAMES_EVENTS = 2_000_000

# Of a peer of ours that has the device to itself: nearly all of its memory, as PyTorch takes it.
WHOLE_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}

# How XLA, CUDA and PyTorch say that a device's memory is full.
FULL = "RESOURCE_EXHAUSTED|OUT_OF_MEMORY|OutOfMemoryError"


@dataclass
class Bench:
    """What the suites share: settings from the command line, and the peers' facts as they come."""

    python: str
    peer_python: str
    rounds: int
    limit: float
    gpu: bool
    backends: list[str] | None  # implementations of SpikingJelly's neuron on a GPU; None: see `spikingjelly`
    say: Callable

    def __post_init__(self):
        self.rows, self.peers = [], {}
        # On a GPU a run is several calls, waited for together: starting one costs as much as a small one takes.
        self.calls = 8 if self.gpu else 1

    def spikingjelly(self, spec, label=""):
        """SpikingJelly's peers for a spec: one on a CPU, one for each implementation of its neuron on a GPU.

        Unless told which, each by itself where the neuron is measured, elsewhere the one that SpikingJelly chooses.
        """
        backends = {"SpikingJelly": {}}
        if self.gpu:
            names = self.backends or (("torch", "cuda", "triton") if spec["kind"] == "neuron" else ("auto",))
            backends = {f"SpikingJelly {name}": {"SJ_PLIF_CUDA_IMPLEMENTATION": name} for name in names}
        return {name + label: self.theirs(spec, env) for name, env in backends.items()}

    def theirs(self, spec, environment=()):
        """A peer of the other interpreter, on the kind of device that JAX has."""
        hidden = {} if self.gpu else {"CUDA_VISIBLE_DEVICES": ""}
        return self.peer_python, "torch_work", spec | {"gpu": self.gpu}, hidden | dict(environment)

    def ours(self, spec, environment=()):
        """A peer of our own interpreter."""
        return self.python, "jax_work", spec, dict(environment)

    @contextlib.contextmanager
    def started(self, case, wanted):
        """The peers that run, {name: peer}; one that cannot becomes a line that says why."""
        with contextlib.ExitStack() as stack:
            starting = ((name, stack.enter_context(contextlib.closing(Peer(*peer)))) for name, peer in wanted.items())
            running = {}
            # On a GPU each once the one before is ready: compiling times kernels, which others' work would mislead.
            for name, peer in starting if self.gpu else list(starting):
                try:
                    self.peers[f"{case}: {name}"] = peer.ready()
                    running[name] = peer
                except PeerError as error:
                    self.tell(missing(case, name, str(error)))
            yield running

    def in_turn(self, case, running):
        """Seconds and facts of running peers; one that dies becomes a line that says why."""
        seconds, died = in_turn(running, self.rounds, self.limit)
        for name, reason in died.items():
            self.tell(missing(case, name, reason))
        return seconds, {name: running[name].facts for name in seconds}

    def measure(self, case, wanted):
        """Seconds and facts of peers started together."""
        with self.started(case, wanted) as running:
            return self.in_turn(case, running)

    def tell(self, line):
        """Keeps a line of the table and says it."""
        self.rows.append(line)
        self.say(line)


def _others(found):
    """Who stands beside ours, where ours was measured."""
    return [name for name in found if name != "ours"] if "ours" in found else []


def neuron(bench, *, Ts, N):
    """PLIF forward and backward over [T, N], against SpikingJelly and against a copy of the bytes it must move."""
    for T in Ts:
        case = f"neuron T={T} N={N}"
        spec = {"kind": "neuron", "T": T, "N": N, "calls": bench.calls}
        peers = {"ours": bench.ours(spec), "copy": bench.ours(spec | {"kind": "copy"}), **bench.spikingjelly(spec)}
        seconds, facts = bench.measure(case, peers)
        seconds = {name: [t / bench.calls for t in times] for name, times in seconds.items()}
        for name in _others(seconds):
            if name == "copy":
                target = Target(1.25 if bench.gpu else 2.5, at_most=True)
                bandwidth = facts["copy"]["bytes"] / statistics.median(seconds["copy"])
                bench.tell(row(case, seconds, "ours", name, slower=False, target=target, bytes_per_s=bandwidth))
            else:
                bench.tell(row(case, seconds, "ours", name, target=None if bench.gpu else Target(3.0)))


def network(name):
    """A data set's network as the peers are told of it."""
    facts = DATASETS[name]
    fields = {key: value for key, value in asdict(facts).items() if key in ("shape", "classes", "T")}
    return {"name": name, "channels": facts.channels, "number_layer": facts.number_layer, **fields}


def _rates(bench, kind, targets, *, names, batches, precisions, modes):
    """Samples per second of networks, against SpikingJelly's two ways, and the share of the matrix rate reached."""
    for name, batch, precision in ((n, b, p) for n in names for b in batches for p in precisions):
        case = f"{kind} {name} batch={batch} {precision}"
        spec = {"kind": kind, "network": network(name), "batch": batch, "precision": precision, "calls": bench.calls}
        matmul = {"kind": "matmul", "size": 8192 if bench.gpu else 2048, "precision": precision, "calls": bench.calls}
        environment = WHOLE_MEMORY if batch == "largest" else {}
        ours = {"ours": bench.ours(spec, environment), "matrix product": bench.ours(matmul)}
        theirs = {}
        for mode in modes:
            theirs |= bench.spikingjelly(spec | {"mode": mode[0]}, f" {mode}")
        goals = targets(name, batch, precision) if precision == "float32" or bench.gpu else {}
        share_told = False
        for seconds, facts in _measured(bench, case, ours, theirs, alone=batch == "largest"):
            if not share_told and ours.keys() <= seconds.keys():
                _tell_share(bench, case, seconds, facts, goals.get("matrix product"))
                share_told = True
            if "ours" in seconds:
                _tell_rates(bench, case, seconds, facts, goals)


def _measured(bench, case, ours, theirs, alone):
    """Seconds and facts of peers that run in turn: on a GPU, whose memory they share, ours beside one of theirs.

    `alone` runs each by itself: it takes as much memory as there is.
    """
    if alone:
        seconds, facts = {}, {}
        for name, peer in {**ours, **theirs}.items():
            one, its = bench.measure(case, {name: peer})
            seconds, facts = seconds | one, facts | its
        yield seconds, facts
        return
    if not bench.gpu:
        yield bench.measure(case, {**ours, **theirs})
        return
    with bench.started(case, ours) as running:
        for name, peer in theirs.items():
            if "ours" not in running:
                break
            with bench.started(case, {name: peer}) as one:
                seconds, facts = bench.in_turn(case, running | one)
            running = {n: peer for n, peer in running.items() if n in seconds}
            yield seconds, facts


def _tell_rates(bench, case, seconds, facts, targets):
    """The lines of one measurement, ours against each of theirs."""
    per_sample = {n: [t / facts[n]["samples"] for t in seconds[n]] for n in seconds if n != "matrix product"}
    for n in _others(per_sample):
        target = targets.get(n.rsplit(" ", 1)[1])
        samples = {f"samples_per_s_{who}": 1 / statistics.median(per_sample[who]) for who in ("ours", n)}
        found = case.replace("largest", f"{facts['ours']['batch']} / {facts[n]['batch']}")
        larger = {who: facts[who].get("larger") for who in ("ours", n)}  # why they run no larger batch
        others = [f"{who}: {why}" for who, why in larger.items() if why and not re.search(FULL, why)]
        stopped = {"stopped": "; ".join(others)} if others else {}
        bench.tell(row(found, per_sample, "ours", n, target=target, **samples, **stopped))


def _tell_share(bench, case, seconds, facts, target):
    """How much of the machine's rate of matrix products the step reaches: the time that its own take at that rate."""
    flops, samples = facts["ours"]["flops"], facts["ours"]["samples"]
    work = {"ours": 1 / samples, "matrix product": flops / samples / facts["matrix product"]["flops"]}
    per_sample = {n: [t * share for t in seconds[n]] for n, share in work.items()}
    rates = {f"flops_per_s_{n.replace(' ', '_')}": flops / samples / statistics.median(per_sample[n]) for n in work}
    found = case.replace("largest", str(facts["ours"]["batch"]))
    bench.tell(row(found, per_sample, "ours", "matrix product", target=target, **rates))


def train(bench, **what):
    """Training steps of `names` networks at `batches` sizes and `precisions`, beside SpikingJelly's `modes`."""

    def targets(name, batch, precision):
        if bench.gpu and batch == 16:
            return {"multi-step": Target(2.0)} if precision == "float32" else {}
        if bench.gpu:
            share = {"matrix product": Target(0.45)} if name == "CIFAR10" else {}
            return {"multi-step": Target(1.5), **share} if precision == "bfloat16" else {}
        # On a CPU the MNIST network alone has targets: the larger ones are one convolution after another.
        return {"multi-step": Target(1.6), "single-step": Target(2.5)} if name in ("MNIST", "FashionMNIST") else {}

    _rates(bench, "train", targets, **what)


def infer(bench, **what):
    """Forward passes in evaluation mode, as `train`."""
    _rates(bench, "infer", lambda *_: {} if bench.gpu else {"multi-step": Target(1.6)}, **what)


def frames(bench, *, recordings):
    """Events to frames, against tonic's ToFrame and SpikingJelly's integration."""
    for name, T, events in recordings:
        case = f"frames {name} {events['events']} events T={T}"
        spec = {"kind": "frames", "T": T, "events": events, "repeats": max(1, FRAMES_EVENTS // events["events"])}
        peers = {
            "ours": bench.ours(spec | {"by": "plif_jax"}),
            "tonic ToFrame": bench.ours(spec | {"by": "tonic"}),
            "SpikingJelly": bench.theirs(spec),
        }
        seconds, _ = bench.measure(case, peers)
        seconds = {name: [t / spec["repeats"] for t in times] for name, times in seconds.items()}
        for name in _others(seconds):
            bench.tell(row(case, seconds, "ours", name, target=Target(10.0)))


def pipeline(bench, *, name, data_root, train_samples, test_samples):
    """An epoch as a user runs it, over its bare steps and evaluations: batches, logs and checkpoints are the rest."""
    case = f"pipeline {name} {train_samples}+{test_samples}"
    spec = {"kind": "epoch", "network": network(name), "precision": "float32", "data_root": data_root}
    spec |= {"train_samples": train_samples, "test_samples": test_samples, "warmup": 1, "calls": 1}
    with tempfile.TemporaryDirectory(prefix="plif_jax_bench_") as folder:
        # A GPU's kernels are chosen when a program is compiled, not always alike: the peer that starts second there
        # runs what the first compiled.
        shared = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        peers = {n: bench.ours(spec | {"bare": n == "bare steps"}, shared) for n in ("as run", "bare steps")}
        seconds, _ = bench.measure(case, peers)
    if len(seconds) == 2:
        target = Target(1.05, at_most=True)
        bench.tell(row(case, seconds, "as run", "bare steps", slower=False, target=target))


def memory(bench, *, names, Ts):
    """Peak memory of a training step against SpikingJelly's, and how both grow with T."""
    target = Target(0.5, at_most=True) if bench.gpu else None
    for name in names:
        peaks = {T: _peaks(bench, name, T, target) for T in sorted(set(Ts))}
        short, long = min(Ts), max(Ts)
        growth = {who: [peaks[long][who] / peaks[short][who]] for who in peaks[long] if peaks[short].get(who)}
        for who in _others(growth) if short != long else ():
            bench.tell(row(f"memory {name} T={long} over T={short}", growth, "ours", who, slower=False, unit="x"))


def _peaks(bench, name, T, target):
    """Tells, and returns, the peak memory of a training step, {peer: MiB}."""
    case = f"memory {name} T={T} batch=16"
    spec = {"kind": "memory", "network": network(name) | {"T": T}, "batch": 16, "precision": "float32", "calls": 1}
    backends = bench.spikingjelly(spec | {"mode": "m"}, " multi-step")
    found = {}
    for who, peer in {"ours": bench.ours(spec), **dict(list(backends.items())[:1])}.items():
        with bench.started(case, {who: peer}) as running:  # ready: it has run
            found |= {n: peer.facts["peak_bytes"] / 2**20 for n, peer in running.items()}
    figures = {who: [peak] for who, peak in found.items()}
    for who in _others(found):
        bench.tell(row(case, figures, "ours", who, slower=False, target=target, unit="MiB"))
    return found
