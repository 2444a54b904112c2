"""The machine that measures: what it is (part of cache keys and evidence), and whether others keep it busy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from hfaccel.runtime.cores import logical_cores, physical_cores

_CPUINFO = Path("/proc/cpuinfo")
_BUSY_SHARE = 0.15


def host_fingerprint() -> dict[str, str | int]:
    """What makes timings of two machines comparable: CPU brand, instruction set family, cores, operating system.

    It holds nothing that changes from run to run, so it can be part of a cache key.
    """
    return {
        "cpu": cpu_brand(),
        "machine": platform.machine(),
        "physical_cores": physical_cores(),
        "logical_cores": logical_cores(),
        "os": platform.system(),
    }


def cpu_brand() -> str:
    """The CPU's name as the kernel tells it, or the best that the platform knows."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")) and ":" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Runnable processes, averaged over one minute; None where the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds spent until ``at_s``: by the whole machine and by this process."""

    at_s: float
    machine_s: float
    process_s: float


def read_cpu_use() -> CpuUse:
    """CPU seconds spent so far."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    # guest time is part of user time already; steal is time that other machines on the same host took.
    busy = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return CpuUse(at_s=time.monotonic(), machine_s=busy, process_s=own.user + own.system)


def busy_warning(
    *,
    interval_s: float = 0.3,
    read: Callable[[], CpuUse] = read_cpu_use,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """A warning when other processes use the cores, so that timings here mean little; None when the machine is quiet.

    Args:
        interval_s: how long to watch.
        read: CPU seconds spent so far.
        sleep: how to wait.
    """
    before = read()
    sleep(interval_s)
    after = read()
    elapsed_s = max(after.at_s - before.at_s, 1e-6)
    others = ((after.machine_s - before.machine_s) - (after.process_s - before.process_s)) / elapsed_s
    if others <= _BUSY_SHARE * logical_cores():
        return None
    return f"other processes use {others:.1f} of {logical_cores()} cores: timings may be unstable"


def library_versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions without importing the libraries; a library that is not installed is ``absent``."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions
