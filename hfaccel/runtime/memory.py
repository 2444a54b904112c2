"""Memory that was freed while a model was opened, and that the C library would keep for itself."""

from __future__ import annotations

import ctypes


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is GNU's (``malloc_trim``); elsewhere nothing happens.

    Engines lay weights out anew when they open a graph, and what they free on the way lies between what stays: of SmolLM2 in 8 bit 150 of
    540 MB that a serving process would hold for good. It takes some milliseconds.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, where a library must be named
        return
    trim(0)
