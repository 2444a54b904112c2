"""Imports CTranslate2 so that it does not slow torch down."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def load_ctranslate2() -> Any:
    """The package, bound to the OpenMP that its wheel brings.

    Imported as usual beside torch its calls go to torch's OpenMP, whose symbols are global. CTranslate2 computes in threads of its own
    and keeps a team of workers for them; GNU's OpenMP then counts more threads than cores, and lets all its threads, torch's too, sleep
    at every barrier instead of spinning (``GOMP_SPINCOUNT`` in its manual). torch took 1.5 times as long for Whisper from the first
    call of CTranslate2 on, for as long as its model was open.
    """
    if "ctranslate2" in sys.modules or not hasattr(os, "RTLD_DEEPBIND"):  # of glibc only
        return importlib.import_module("ctranslate2")
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)
    try:
        return importlib.import_module("ctranslate2")
    finally:
        sys.setdlopenflags(flags)
