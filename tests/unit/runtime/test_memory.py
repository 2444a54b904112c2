"""What was freed goes back to the system, where the C library can give it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from hfaccel.runtime import memory
from hfaccel.runtime.memory import give_back_freed_memory

SCRIPT = """
import sys, psutil
from hfaccel.runtime.memory import give_back_freed_memory
blocks = [bytearray(50_000) for _ in range(2000)]  # small enough for the heap
kept = blocks[::20]
del blocks
before = psutil.Process().memory_info().rss
give_back_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not the GNU C library")
def test_memory_freed_between_what_stays_goes_back() -> None:
    finished = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(finished.stdout) > 50e6


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_elsewhere_nothing_happens(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_name: None) -> None:
        raise error

    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    give_back_freed_memory()
