"""How many cores this process may really use, which in a container is often fewer than the machine has.

An engine that starts a thread for each core where a limit leaves fewer is stopped again and again in the middle of its work (Linux grants
the share of a period, then makes all threads wait: the kernel's documentation of CFS bandwidth control). MiniLM on two cores with
the time of one: two threads took 8.7 ms a text and 53 ms for one in twenty, one thread took 5.1 and 5.9 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def logical_cores() -> int:
    """Hardware threads that this process may use (its affinity, where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Physical cores that this process may use, by its affinity and by the limit of its container: as many threads are best, mostly."""
    cores, quota = _cores(), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def threads_to_open_with() -> int:
    """Threads for an engine that was told no number: 0, which leaves it the choice, unless a limit leaves fewer cores than it would take.

    Engines look at affinity themselves, at limits of control groups they do not.
    """
    quota = cpu_quota()
    return 0 if quota is None or quota >= _cores() else physical_cores()


def _cores() -> int:
    return min(psutil.cpu_count(logical=False) or logical_cores(), logical_cores())


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that control groups (Linux, both versions) leave this process; None without such a limit.

    Args:
        root: of the file system.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # Inside a container the path may be that of the host, of which nothing is to be seen: then the mount itself is the group.
        for folder in [mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents]:
            quota = _quota_of(folder, version=1 if controllers else 2)
            if quota is not None:
                yield quota
            if folder == mount:
                break


def _quota_of(folder: Path, *, version: int) -> float | None:
    """Of one group: version 2 has ``max 100000`` or ``400000 100000`` in one file, version 1 has two files, with -1 for no limit."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
