"""Every error that hfaccel raises on purpose, and the exit code that each class ends with.

An error says what went wrong, where (file, option, stage, node or recipe path) and what to do next. The library raises; only
``hfaccel.cli.app`` turns an error into an exit code.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of the command line; README has the same table."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    SETTINGS = 3
    SOURCE = 4
    EXPORT = 5
    GATE = 6
    RESOURCES = 7
    TARGET = 8
    INTEGRITY = 9
    BATCH = 10
    INTERRUPTED = 130


class HfaccelError(Exception):
    """Base of all deliberate errors.

    Args:
        what: what went wrong, one sentence without a final full stop.
        where: the file, option, stage, node or recipe path concerned; empty when the sentence says it already.
        hint: what the user can do next.
    """

    exit_code: ExitCode = ExitCode.UNEXPECTED

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes whole, whatever arguments their class takes."""
        return _restore, (type(self), self.what, self.where, self.hint, self.exit_code, getattr(self, "__notes__", []))

    def __str__(self) -> str:
        """One line: ``where: what (hint)``."""
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.hint})" if self.hint else ""
        return f"{place}{self.what}{advice}"


def _restore(kind: type[HfaccelError], what: str, where: str, hint: str, exit_code: ExitCode, notes: list[str]) -> HfaccelError:
    error = kind.__new__(kind)
    HfaccelError.__init__(error, what, where=where, hint=hint)
    error.exit_code = exit_code
    for note in notes:
        error.add_note(note)
    return error


class UsageError(HfaccelError):
    """The command line cannot be carried out as written."""

    exit_code = ExitCode.USAGE


class SettingsError(HfaccelError):
    """A recipe, a setting or an output path is not usable."""

    exit_code = ExitCode.SETTINGS


class RecipeError(SettingsError):
    """A recipe file is not valid; ``where`` is ``file:line: key.path``."""


class DataError(SettingsError):
    """A data file is missing, empty, or lacks the columns that the task needs."""


class SourceError(HfaccelError):
    """The checkpoint is missing, corrupt, or refused (remote code, pickle weights)."""

    exit_code = ExitCode.SOURCE


class ExportError(HfaccelError):
    """No exporter could turn the checkpoint into a graph, or its architecture is not supported."""

    exit_code = ExitCode.EXPORT


class GateError(HfaccelError):
    """A gate (parity, accuracy, fusion contract, batch invariance) was missed; nothing is published."""

    exit_code = ExitCode.GATE


class ResourceError(HfaccelError):
    """Not enough memory, disk or time."""

    exit_code = ExitCode.RESOURCES


class TargetError(HfaccelError):
    """The target, execution provider or engine is unknown or not available here."""

    exit_code = ExitCode.TARGET


class IntegrityError(HfaccelError):
    """An artifact on disk is not what its manifest says, or does not answer its golden inputs."""

    exit_code = ExitCode.INTEGRITY


class MissingExtraError(SettingsError):
    """A command needs packages that the base install does not have."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed",
            hint=f"run: pip install 'hfaccel[{extra}]'",
        )
