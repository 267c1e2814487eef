"""The devices of a run, from the paper program's -device flag, and where what is compiled for them is kept."""

import jax

from plif_jax.config import expanded
from plif_jax.data.dataset import default_cache_dir
from plif_jax.errors import UserError


def start():
    """Starts JAX's devices.

    Raises:
      UserError: those that $JAX_PLATFORMS names do not start.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        why = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise UserError(f"JAX finds no device of JAX_PLATFORMS={asked}{why}; give cpu, or leave it unset") from None


def choose(config, say=print) -> list:
    """The devices that share the batch; all of them where `device` is absent.

    "cpu", "gpu" (or "cuda") and "tpu" name all devices of a kind, "cuda:0" one, "cuda:0,1" several. Where the machine
    has none of that kind, the devices that it has are taken, and that is said: so the paper's commands run anywhere.

    Raises:
      UserError: the device does not exist, the processes have unequally many, or the batch does not divide among them.
    """
    devices = jax.devices()
    if config.device is not None:
        devices = _named(config.device, say)
    devices = sorted(devices, key=lambda device: device.process_index)  # JAX wants each process's together
    counts = [sum(device.process_index == process for device in devices) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(
            f"-device {config.device}: the processes have {', '.join(map(str, counts))} of these devices; "
            f"leave -device out, or name equally many of each process, of {len(jax.devices(devices[0].platform))}"
        )
    share, rest = divmod(config.batch_size, len(devices))
    if rest:
        fitting = [n for n in (share * len(devices), (share + 1) * len(devices)) if n]
        raise UserError(
            f"-batch_size {config.batch_size} does not divide among {len(devices)} devices; "
            f"give {' or '.join(map(str, fitting))}, or fewer devices with -device"
        )
    return devices


def _named(name, say):
    kind, _, numbers = name.partition(":")
    platform = {"cuda": "gpu", "gpu": "gpu", "cpu": "cpu", "tpu": "tpu"}.get(kind)
    picked = [part for part in numbers.split(",") if part]
    if platform is None or not all(part.isdecimal() for part in picked):
        raise UserError(f"-device {name}: give cpu, tpu, cuda, cuda:0 or cuda:0,1")
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        devices = jax.devices()
        say(f"-device {name}: JAX finds no {kind} here; using {', '.join(map(str, devices))}")
        return devices
    beyond = [part for part in picked if int(part) >= len(devices)]
    if beyond:
        there = f"{kind}:0" + (f" to {len(devices) - 1}" if len(devices) > 1 else " alone")
        raise UserError(f"-device {name}: there is no {kind}:{beyond[0]}; this machine has {there}")
    return [devices[int(part)] for part in dict.fromkeys(picked)] or devices


def keep_compiled(devices, cache_dir=None):
    """Has JAX keep in `cache_dir` what it compiles, for the next start, unless the user has told it where already.

    Not on a CPU: another machine that shares the folder may have one that lacks some of the instructions.
    """
    if devices[0].platform != "cpu" and not jax.config.jax_compilation_cache_dir:
        folder = expanded(cache_dir or default_cache_dir()) / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
