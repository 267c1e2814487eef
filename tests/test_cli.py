"""How a script ends: with which status, and what it says."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import jax
import pytest

from plif_jax import cli
from plif_jax.errors import UserError
from plif_jax.training.signals import Interrupted, Stop

PRINT_MUCH = "from plif_jax import cli; cli.run(lambda argv: [print('line', i) for i in range(100_000)])"


@pytest.fixture
def ended(monkeypatch, capfd):
    """Gives a function: (exit status, standard error) of a script that raises this."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)  # of the whole process
    monkeypatch.setattr(sys, "argv", ["experiments/train.py"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def end(error):
        def main(argv):
            raise error

        with pytest.raises(SystemExit) as left:
            cli.run(main)
        return left.value.code, capfd.readouterr().err

    return end


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("give another"), 2, "train.py: give another\n"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "summary.png"),
            2,
            "train.py: summary.png: Is a directory\n",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand more"),
            2,
            "train.py: a device's memory is full, of this program or of others beside it; a smaller batch, T or width "
            "takes less (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)\n",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: failed call: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
            2,
            "train.py: a device's memory is full, of this program or of others beside it; a smaller batch, T or width "
            "takes less (INTERNAL: failed call: CUDA_ERROR_OUT_OF_MEMORY: out of memory)\n",
        ),
        (
            MemoryError("Unable to allocate 2.10 TiB"),
            2,
            "train.py: this machine's memory is full, of this program or of others beside it; a smaller batch, T or "
            "width takes less (Unable to allocate 2.10 TiB)\n",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "c.py"), 2, "train.py: c.py: File name too long\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "train.py: a file, or standard output: No space left on device\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (Interrupted(15), 143, ""),
    ],
)
def test_a_script_ends_in_a_status_and_at_most_a_line(ended, error, status, said):
    assert ended(error) == (status, said)


def test_a_loop_over_runs_that_catches_errors_is_stopped_too():
    with pytest.raises(Interrupted), contextlib.suppress(Exception):
        raise Interrupted(signal.SIGINT)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), BrokenPipeError("of a worker")])
def test_a_defect_shows_where_it_is(ended, error):
    status, said = ended(error)
    assert status == 1 and said.startswith("Traceback") and said.endswith(f"{type(error).__name__}: {error}\n")


@pytest.mark.parametrize("number, stream", [(1, "stdout"), (2, "stderr")])
def test_without_anywhere_to_print_it_ends_well(number, stream):
    """And so do the programs that it starts, which have such a stream too."""
    write = f"import sys; sys.{stream}.write('nothing')"
    program = f"from plif_jax import cli\ndef main(argv):\n {write}\n import subprocess\n"
    program += f' subprocess.run([sys.executable, "-c", {write!r}], check=True)\ncli.run(main)'
    closed = ["sh", "-c", f'exec "$0" "$@" {number}>&-', sys.executable, "-c", program]
    assert subprocess.run(closed, timeout=120).returncode == 0


@pytest.mark.parametrize("message, said", [("Event loop is closed", False), ("another", True)])
def test_writes_that_fail_after_the_first_say_nothing(ended, capfd, message, said):
    """TensorStore's threads find the checkpoint's event loop closed, and Python prints what nobody can catch."""

    class Late:
        def __del__(self):
            raise RuntimeError(message)

    ended(KeyboardInterrupt())
    Late()
    assert (message in capfd.readouterr().err) == said


def test_a_mistake_keeps_its_status_where_nobody_reads():
    program = (
        "from plif_jax import cli, errors\ndef main(argv):\n print(1)\n raise errors.UserError('no')\ncli.run(main)"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)
    gone = subprocess.Popen([sys.executable, "-c", program], **options)
    gone.stdout.close()
    assert (gone.stderr.read(), gone.wait(60)) == ("-c: no\n", 2)


def test_a_reader_who_has_seen_enough_ends_it_quietly():
    program = subprocess.Popen([sys.executable, "-c", PRINT_MUCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.readline()
    program.stdout.close()
    assert (program.stderr.read(), program.wait(60)) == (b"", 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_standard_output_is_told():
    program = "from plif_jax import cli\ncli.run(lambda argv: print('much'))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=buffered
        )
    assert ended.returncode == 2 and "standard output: No space left on device" in ended.stderr


def test_the_first_signal_says_how_a_program_ends():
    stop = Stop()
    stop._ask(signal.SIGTERM, None)
    stop._ask(signal.SIGINT, None)
    assert stop.signum == signal.SIGTERM
