"""The only module that prints. Results go to standard output, talk goes to standard error; ``--json`` turns results into JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from hfaccel.errors import HfaccelError
    from hfaccel.stages.base import StageName


LOG_WIDTH = 160
"""Columns of tables in files and CI logs, where rich would assume 80."""


class Output:
    """How one command talks: a result on stdout (table or JSON), everything else on stderr.

    Args:
        as_json: print results as one JSON document instead of text.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._started = time.monotonic()
        self._consoles: dict[str, Console] = {}

    def _console(self, stream: str) -> Console:
        from rich.console import Console  # rich costs 50 ms, --help does without

        if stream not in self._consoles:
            terminal = (sys.stderr if stream == "err" else sys.stdout).isatty()
            width = None if terminal else LOG_WIDTH
            self._consoles[stream] = Console(stderr=stream == "err", highlight=False, soft_wrap=True, width=width)
        return self._consoles[stream]

    def result(self, data: Any) -> None:
        """Print the machine-readable result; nothing in text mode."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def line(self, text: str = "") -> None:
        """A line of the human-readable result; nothing with ``--json``."""
        if not self.as_json:
            self._console("out").print(text, markup=False)

    def piece(self, text: str) -> None:
        """A part of the human-readable result, shown at once and as it is."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table of the human-readable result; columns whose cells are all numeric are right-aligned."""
        if self.as_json:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, title_justify="left", header_style="bold", expand=False)
        for index, name in enumerate(columns):
            numeric = all(_is_numeric(row[index]) for row in rows) if rows else False
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        self._console("out").print(table, soft_wrap=False)

    def info(self, text: str) -> None:
        """Talk: progress and notices, on standard error."""
        self._console("err").print(text, markup=False)

    def warn(self, text: str) -> None:
        """A warning, on standard error."""
        self._console("err").print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def showing_warnings(self) -> Iterator[None]:
        """Say what code within warns of with Python's warnings, without the file and line that mean nothing to a user."""
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            yield
        for item in caught:
            self.warn(str(item.message))

    def step(self, text: str) -> None:
        """A plain progress line with the seconds since the start, for logs and CI."""
        self._console("err").print(f"{time.monotonic() - self._started:7.1f}s  {text}", markup=False)

    @contextmanager
    def progress(self) -> Iterator[TerminalProgress]:
        """Progress of long work: a bar under the finished lines on a terminal, plain lines elsewhere."""
        console = self._console("err")
        if not console.is_terminal:
            yield TerminalProgress(self, None)
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[stage]}", markup=False, style="bold"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        # What has happened is on the finished lines, so the bar leaves nothing behind.
        with Progress(*columns, console=console, transient=True) as bar:
            progress = TerminalProgress(self, bar)
            try:
                yield progress
            finally:
                progress.finish()

    def error(self, error: HfaccelError) -> None:
        """The one way an error reaches the user; with ``--json`` also as a JSON document on stdout."""
        if self.as_json:
            self.result({"error": {"code": int(error.exit_code), "what": error.what, "where": error.where, "hint": error.hint}})
        console = self._console("err")
        console.print(f"error: {error.where + ': ' if error.where else ''}{error.what}", style="bold red", markup=False)
        if error.hint:
            console.print(f"  what to do: {error.hint}", markup=False)


class TerminalProgress:
    """Where the pipeline reports to.

    Without a bar each step is a line, printed when it starts. With a bar the current step stands beside it and becomes a line when
    it ends; the bar is as long as all stages, and fills within a stage as far as that tells how much is done.
    """

    def __init__(self, output: Output, bar: Bar | None) -> None:
        self._output = output
        self._bar = bar
        self._task = bar.add_task("", total=None, stage="starting", count="") if bar is not None else None
        self._current = ""
        self._index = 0

    def stage(self, name: StageName, index: int, total: int) -> None:
        """Say that a stage starts: it moves the bar, lines come from the steps."""
        self.finish()
        self._index = index
        if self._bar is not None and self._task is not None:
            stage = f"{name} {index}/{total}"
            self._bar.update(self._task, completed=index - 1, total=total, stage=stage, count="", description="")

    def step(self, text: str) -> None:
        """Say what is being done now."""
        if self._bar is None or self._task is None:
            self._output.step(text)
            return
        self.finish()
        self._current = text
        self._bar.update(self._task, description=text)

    def advance(self, done: int, total: int) -> None:
        """Say how much of the stage is done."""
        if self._bar is not None and self._task is not None and self._index and total > 0:
            self._bar.update(self._task, completed=self._index - 1 + done / total, count=f"{done} of {total}")

    def warn(self, text: str) -> None:
        """Say what the user must see."""
        self._output.warn(text)

    def finish(self) -> None:
        """Turn the current step into a finished line."""
        if self._current:
            self._output.step(self._current)
            self._current = ""


def _is_numeric(cell: object) -> bool:
    text = str(cell if cell is not None else "").strip().lstrip("+-").rstrip("%x")
    return text == "" or text.replace(".", "", 1).replace(",", "").isdigit()
