"""The hint of an error about an unknown name: the known name that is closest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or the list of known names where none is close; empty when nothing is known."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if matches:
        return f"did you mean '{matches[0]}'?"
    return f"known: {', '.join(names)}" if names else ""
