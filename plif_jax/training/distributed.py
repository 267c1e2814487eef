"""Several processes as one run, through JAX's own runtime."""

import os

import jax

from plif_jax.errors import UserError

# A peer that says nothing for this long is taken for dead, and the run ends.
HEARTBEAT_SECONDS = 30


def join(config):
    """Joins the other processes of the run: as the flags say, or as found on SLURM and TPU pods; else does nothing.

    Raises:
      UserError: some of -coordinator, -num_processes and -process_id are missing, or the coordinator does not answer.
    """
    given = {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"-{name}" for name, value in given.items() if value is None]
    settings = {}
    if len(missing) < len(given):
        if missing:
            raise UserError(
                f"{' and '.join(missing)} missing: several processes need -coordinator, -num_processes, -process_id"
            )
        if config.process_id >= config.num_processes:
            raise UserError(f"-process_id {config.process_id}: give 0 to {config.num_processes - 1}")
        settings = dict(
            coordinator_address=config.coordinator, num_processes=config.num_processes, process_id=config.process_id
        )
    elif not _on_cluster():
        return
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=120)
    except RuntimeError as error:
        raise UserError(f"the processes did not find each other: {str(error).splitlines()[0]}") from None


def _on_cluster():
    """Whether SLURM or a TPU pod started more than one process; JAX then finds the rest by itself."""
    several_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))) > 1
    return several_tasks or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
