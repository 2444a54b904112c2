"""What a search has found so far, on disk: a search that was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfaccel.quant.sensitivity import Sums


class Journal:
    """Findings about a rung, one JSON line each, kept until the stage has finished; a :class:`hfaccel.quant.sensitivity.Ledger`.

    There are two kinds: trials of the gate with some MatMuls in higher precision, and errors measured with some quantized.

    Args:
        path: the file; it may exist already, from a run that was killed. None keeps nothing.
        rung: what the findings are about; the quantization part of a rung, so that engines share them.
    """

    def __init__(self, path: Path | None, rung: str) -> None:
        self._path = path
        self._rung = rung
        self._trials: dict[frozenset[str], bool] = {}
        self._errors: dict[tuple[int, frozenset[str]], Sums] = {}
        text = path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""
        for line in text.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut
        self._cut = not text.endswith("\n") and bool(text)

    @property
    def trials(self) -> int:
        """How many trials are known."""
        return len(self._trials)

    def known_trial(self, kept_float: frozenset[str]) -> bool | None:
        """The outcome of a trial made before, or None."""
        return self._trials.get(kept_float)

    def add_trial(self, kept_float: frozenset[str], holds: bool) -> None:
        """Write down a trial at once."""
        self._add({"kind": "trial", "float": sorted(kept_float), "holds": holds})

    def known_error(self, batch: int, quantized: Sequence[str]) -> Sums | None:
        """What was found before on a batch with these MatMuls quantized, or None."""
        return self._errors.get((batch, frozenset(quantized)))

    def add_error(self, batch: int, quantized: Sequence[str], sums: Sums) -> None:
        """Write down at once what was found on a batch with these MatMuls quantized."""
        self._add({"kind": "error", "batch": batch, "quantized": sorted(quantized), "sums": list(sums)})

    def _take(self, entry: Mapping[str, Any]) -> None:
        if entry["rung"] != self._rung:
            return
        if entry["kind"] == "trial":
            self._trials[frozenset(entry["float"])] = bool(entry["holds"])
        elif entry["kind"] == "error":
            moved, relative_to = entry["sums"]
            self._errors[int(entry["batch"]), frozenset(entry["quantized"])] = (float(moved), float(relative_to))

    def _add(self, finding: Mapping[str, Any]) -> None:
        entry = {"rung": self._rung, **finding}
        self._take(entry)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if self._cut else "") + json.dumps(entry) + "\n")
        self._cut = False
