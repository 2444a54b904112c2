"""Memory of this process and of this machine, in bytes."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil

_KIBIBYTE = 1024
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident since it started."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * _KIBIBYTE
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes here, the others kibibytes.
    return int(peak) if sys.platform == "darwin" else int(peak) * _KIBIBYTE


def resident_bytes() -> int:
    """The memory that this process has resident now."""
    return int(psutil.Process().memory_info().rss)


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: of the machine, and of this container where it has a limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _read_count(_CGROUP / "memory.max"), _read_count(_CGROUP / "memory.current")
    if limit is None or used is None:
        return available
    # Clean file pages count as used but are given back on demand.
    reclaimable = _read_stat(_CGROUP / "memory.stat", "inactive_file")
    return max(0, min(available, limit - used + reclaimable))


def _read_count(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


class PeakMemory:
    """Context manager: the highest resident memory while its block runs, sampled in a thread.

    A peak shorter than ``interval_s`` can be missed; :func:`peak_memory_bytes` misses none but covers the whole process.

    Attributes:
        start_bytes: resident memory when the block was entered.
        peak_bytes: highest resident memory seen since.
    """

    def __init__(self, *, interval_s: float = 0.01) -> None:
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self.start_bytes = 0
        self.peak_bytes = 0

    @property
    def grown_bytes(self) -> int:
        """How far the peak rose above the start."""
        return self.peak_bytes - self.start_bytes

    def __enter__(self) -> PeakMemory:
        self.start_bytes = self.peak_bytes = resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
