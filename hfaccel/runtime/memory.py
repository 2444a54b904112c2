"""What the weights of an open model lie in: memory that was freed goes back, pages may become huge ones."""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfaccel.artifact.contract import Engine

HUGE_PAGE_BYTES = 2 << 20
_WORTH_MOVING_BYTES = 64 << 20
_COLLAPSE = 25
"""``MADV_COLLAPSE`` of Linux 6.1 and newer: make the pages of a place one huge page, now."""
_MAPS = Path("/proc/self/maps")
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(?:\[heap\]|\[anon.*\])?$")


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is GNU's (``malloc_trim``); elsewhere nothing happens.

    Engines lay weights out anew when they open a graph, and what they free on the way lies between what stays: of SmolLM2 in 8 bit 150 of
    540 MB that a serving process would hold for good. It takes some milliseconds.
    """
    trim = getattr(_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def gains_from_huge_pages(weights_bytes: int, engine: Engine) -> bool:
    """Whether a model of so many bytes is worth moving: openvino gains nothing (BERT-base), nor do 30 MB in onnxruntime (MiniLM)."""
    return engine == "onnxruntime" and weights_bytes >= _WORTH_MOVING_BYTES


def use_huge_pages() -> int:
    """Move what this process has in memory to pages of 2 MiB, as far as the system has such pages (Linux 6.1 and newer).

    A step of a decoder reads all of its weights, and the processor finds few of their 4 KiB pages without looking them up: SmolLM2 takes 0.85
    to 0.95 of the time for a step after it. A page takes 0.6 ms, or 6 ms on a virtual machine that has not used the memory before. What is not
    in memory stays where it is, so nothing grows; once the system has no huge page left, the rest stays too.

    Returns:
        Bytes that lie in huge pages now; 0 where the system knows no such request.
    """
    library = _library()
    if library is None or not _MAPS.is_file():
        return 0
    places = [
        place
        for start, stop in _anonymous_regions(_MAPS.read_text(encoding="utf-8"))
        for place in range(-(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, stop - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES)
        if _is_in_memory(library, place)
    ]
    moved = 0
    for place in places:
        if library.madvise(ctypes.c_void_p(place), ctypes.c_size_t(HUGE_PAGE_BYTES), _COLLAPSE) == 0:
            moved += HUGE_PAGE_BYTES
        elif ctypes.get_errno() == errno.ENOMEM:
            break
    return moved


def _anonymous_regions(maps: str) -> Iterator[tuple[int, int]]:
    """First address and the one after the last of each writable region that belongs to no file."""
    for line in maps.splitlines():
        if (found := _ANONYMOUS.match(line)) is not None:
            yield int(found[1], 16), int(found[2], 16)


def _is_in_memory(library: Any, place: int) -> bool:
    """Whether all pages of a huge page's place are."""
    pages = HUGE_PAGE_BYTES // mmap.PAGESIZE
    states = (ctypes.c_ubyte * pages)()
    asked = library.mincore(ctypes.c_void_p(place), ctypes.c_size_t(HUGE_PAGE_BYTES), states)
    return asked == 0 and all(state & 1 for state in states)


def _library() -> Any:
    """The C library; None on Windows, where a library must be named."""
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None
