"""Training as programs of their own: started, killed, started again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from plif_jax.config import Config

ROOT = Path(__file__).parents[1]
# A run of seconds, whose neurons fire from the start.
SETTINGS = dict(
    dataset_name="Digits",
    use_plif=True,
    use_max_pool=True,
    detach_reset=True,
    init_tau=1.1,
    learning_rate=0.02,
    T=3,
    channels=4,
    number_layer=1,
    batch_size=8,
    train_samples=40,
    test_samples=20,
)


class Program:
    """A training program in a process group of its own, so that nothing of it outlives a test."""

    def __init__(self, config: Config, folder: Path, devices: int):
        flags = [f"-{name}={value}" for name, value in vars(config).items() if value is not None]
        self.output = folder / f"output_{config.process_id or 0}.txt"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "NPROC": "16",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "experiments" / "train.py", *flags],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, signum=signal.SIGKILL):
        """Sends a signal to the program and the workers it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def end(self, within=240) -> int:
        """Waits for the end and returns the exit status, negative where a signal ended it."""
        return self.process.wait(within)

    def said(self) -> str:
        """All that programs of this folder and rank have printed."""
        return self.output.read_text(errors="replace")


@contextlib.contextmanager
def started(*configs, folder, devices=1):
    """Starts a program for each config; whatever happens, none is left running."""
    programs = [Program(config, folder, devices) for config in configs]
    try:
        yield programs if len(programs) > 1 else programs[0]
    finally:
        for program in programs:
            program.kill()
            program.process.wait()


def as_processes(config, count=2):
    """The configs of one run as `count` processes on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    ranks = [dict(coordinator=address, num_processes=count, process_id=i) for i in range(count)]
    return [Config(**vars(config) | rank) for rank in ranks]


def wait_for(condition, within=240):
    """Waits until the condition holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def saved(config) -> list[int]:
    """The steps of the finished checkpoints."""
    return sorted(int(path.name) for path in config.checkpoint_dir.glob("*") if path.name.isdecimal())
