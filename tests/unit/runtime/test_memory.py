"""What was freed goes back to the system, and what stays moves to huge pages, where the system can."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from hfaccel.artifact.contract import Engine
from hfaccel.runtime import memory
from hfaccel.runtime.memory import HUGE_PAGE_BYTES, gains_from_huge_pages, give_back_freed_memory, use_huge_pages

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


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_without_a_c_library_nothing_happens(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_name: None) -> None:
        raise error

    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    give_back_freed_memory()
    assert use_huge_pages() == 0


def test_a_c_library_without_trimming_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: object())
    give_back_freed_memory()


HUGE = """
import psutil
from hfaccel.runtime.memory import HUGE_PAGE_BYTES, use_huge_pages

def huge():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))

block = bytearray(b"x") * 40_000_000
before, size = huge(), psutil.Process().memory_info().rss
moved = use_huge_pages()
print(moved, huge() - before, huge(), psutil.Process().memory_info().rss - size, block == bytearray(b"x") * 40_000_000)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="not Linux")
def test_what_is_in_memory_moves_to_huge_pages_and_nothing_grows() -> None:
    finished = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True)
    moved, gained, after, grown, same = finished.stdout.split()
    assert same == "True"
    assert int(moved) % HUGE_PAGE_BYTES == 0
    # A system may have no such pages, or none left; or it may use them unasked, and then there is nothing to gain.
    assert int(gained) <= int(moved) <= int(after)
    assert int(grown) < HUGE_PAGE_BYTES


def test_only_memory_that_belongs_to_no_file_moves() -> None:
    maps = """55f0000-55f1000 r--p 00000000 fe:00 260368                     /usr/bin/python
56000000-57000000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0001000000-7f0001800000 rw-p 00000000 00:00 0                  [anon: weights]
7f0002000000-7f0002800000 rw-p 00000000 fe:00 339380             /models/model.onnx.data
7f0003000000-7f0003800000 rw-s 00000000 00:01 5                  /dev/shm/shared
7f0004000000-7f0004800000 ---p 00000000 00:00 0
7ffe00000000-7ffe00800000 rw-p 00000000 00:00 0                  [stack]
"""
    starts = [start for start, _ in memory._anonymous_regions(maps)]
    assert starts == [0x56000000, 0x7F0000000000, 0x7F0001000000]


def test_once_no_huge_page_is_left_no_more_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Full:
        """The C library of a system with two huge pages left, and one place that cannot move."""

        def mincore(self, _place: object, _size: object, states: ctypes.Array[ctypes.c_ubyte]) -> int:
            ctypes.memset(states, 1, ctypes.sizeof(states))
            return 0

        def madvise(self, place: ctypes.c_void_p, _size: object, _advice: int) -> int:
            asked.append(place.value or 0)
            ctypes.set_errno((errno.EINVAL, 0, 0, errno.ENOMEM)[len(asked) - 1])
            return -1 if ctypes.get_errno() else 0

    maps = tmp_path / "maps"
    maps.write_text("7f0000000000-7f0001000000 rw-p 00000000 00:00 0\n")
    monkeypatch.setattr(memory, "_MAPS", maps)
    monkeypatch.setattr(memory, "_library", Full)
    assert use_huge_pages() == 2 * HUGE_PAGE_BYTES
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("megabytes", "engine", "gains"), [(63, "onnxruntime", False), (64, "onnxruntime", True), (640, "openvino", False)]
)
def test_only_large_weights_of_onnxruntime_gain(megabytes: int, engine: Engine, gains: bool) -> None:
    assert gains_from_huge_pages(megabytes << 20, engine) == gains


def test_where_no_region_is_known_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MAPS", tmp_path / "none")
    assert use_huge_pages() == 0
