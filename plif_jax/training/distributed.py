"""Several processes as one run, through JAX's own runtime."""

import os
import re
import zlib
from collections import Counter

import jax
import numpy as np
from jax.experimental import multihost_utils

from plif_jax.errors import UserError, first_line
from plif_jax.training import devices

# A peer that says nothing for this long is taken for dead, and the run ends.
HEARTBEAT_SECONDS = 30
# What is each process's own: who it is, and where things lie on its host.
MAY_DIFFER = ("coordinator", "process_id", "data_root", "cache_dir")


def join(config, say=print):
    """Joins the other processes of the run: as the flags say, or as found on SLURM and TPU pods; else does nothing.

    Raises:
      UserError: some of -coordinator, -num_processes and -process_id are missing or wrong, the coordinator does not
        answer, or no device starts.
    """
    settings = _given(config)
    if jax.distributed.is_initialized() or not (settings or _several_slurm_tasks() or _maybe_tpu_pod()):
        return
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=120)
        jax.devices()  # where all meet for the first time: one may have refused its flags and be gone
    except RuntimeError as error:
        if not settings and not _several_slurm_tasks() and "before any JAX calls" in str(error):
            return  # a notebook on a TPU: where there are other hosts, its first computation has met them
        text = first_line(error)
        taken = " (is the port of -coordinator taken? give another)" if "start RPC server" in text else ""
        of_devices = text.startswith("Unable to initialize backend")
        what = "no device starts, or another process is gone" if of_devices else "the processes did not find each other"
        raise UserError(f"{what}: {text}{taken}") from None
    except AssertionError:  # JAX's, where what $JAX_PLATFORMS names does not start
        devices.start()
    except (ValueError, OSError) as error:
        if settings or _several_slurm_tasks():
            raise UserError(f"the processes did not find each other: {error}") from None
        say(f"JAX finds no other hosts of this TPU ({error}); give -coordinator, -num_processes, -process_id if it has")


def agree(facts):
    """Refuses {name: value} that differ between the processes, before they train apart or wait for each other.

    Raises:
      UserError: names what differs, each process its own values; or they have unequally many devices.
    """
    if jax.process_count() == 1:
        return
    counts = Counter(device.process_index for device in jax.devices())
    (most, n), (least, m) = counts.most_common()[0], counts.most_common()[-1]
    if n != m:  # JAX itself has all meet in equal numbers
        raise UserError(
            f"process {most} has {n} devices, process {least} has {m}; give each as many, with CUDA_VISIBLE_DEVICES"
        )
    digests = np.array([zlib.crc32(repr(value).encode()) for value in facts.values()], np.uint32)
    differs = (multihost_utils.process_allgather(digests) != digests).any(0)
    here = [f"{name} {value}" for (name, value), other in zip(facts.items(), differs, strict=True) if other]
    if here:
        raise UserError(f"the processes differ: {', '.join(here)} here, another there; give all the same")


def _given(config):
    """What the flags say, as `jax.distributed.initialize` takes it; nothing where they are absent."""
    given = {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"-{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return {}
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: several processes need -coordinator, -num_processes, -process_id"
        )
    host, _, port = config.coordinator.rpartition(":")
    if not (host and re.fullmatch(r"\d{1,5}", port) and int(port) < 1 << 16):
        raise UserError(f"-coordinator {config.coordinator}: give host:port of process 0, such as localhost:9876")
    if config.process_id >= config.num_processes:
        raise UserError(f"-process_id {config.process_id}: give 0 to {config.num_processes - 1}")
    return {"coordinator_address": config.coordinator} | {name: given[name] for name in ("num_processes", "process_id")}


def _several_slurm_tasks():
    """Whether srun started this process as one of several: a shell in an allocation has the tasks' number alone."""
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _maybe_tpu_pod():
    """Whether this is a TPU that may span hosts. JAX alone knows how to ask, and its devices wait for all hosts.

    JAX itself puts the TPU first where it finds one. What says that there is one host, on Kaggle and Kubernetes, saves
    the asking.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", "unknown, perhaps several"))
    several = "," in hosts or os.environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
    return (jax.config.jax_platforms or "").startswith("tpu") and several
