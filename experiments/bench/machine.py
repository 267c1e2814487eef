"""Which machine this is."""

import os
import platform
import resource
import sys
from pathlib import Path


def machine():
    """{"cpu", "cores", "memory_gib", "system", "python", "load"}; GPUs name themselves in the peers' facts."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def cores():
    """How many of them this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_resident():
    """The most bytes of memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cpu():
    """Family and model numbers beside the name: virtual machines often hide the name."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields = dict(map(str.strip, line.split(":", 1)) for line in info.read_text().split("\n\n")[0].splitlines())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
