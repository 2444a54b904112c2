"""Runs a stage in a process of its own.

Its memory goes back to the system when it ends (torch never gives it back otherwise), timings are taken without the threads of
the stage before, and when the system kills it for want of memory the tool lives on and says so.

Job and result travel as pickles in a private folder between two processes of the same code and the same user; progress comes as
JSON lines on the child's standard output. The child ends itself when its standard input closes, so it never outlives the parent.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from hfaccel.artifact.store import disk_errors
from hfaccel.errors import HfaccelError, ResourceError
from hfaccel.measure.memory import peak_memory_bytes
from hfaccel.stages.base import StageName

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.stages.base import Progress, Stage, StageContext, StageResult

ISOLATED_FROM_BYTES = 32_000_000
"""Weights from which a stage gets its own process: below, starting it (2 to 3 s with torch) costs more than it saves."""
_JOB, _RESULT = "job.pickle", "result.pickle"


class StageFault(Exception):  # noqa: N818 - an unexpected fault of ours, not an error of the user
    """A stage ended with an exception that is no HfaccelError; its traceback is in the notes."""


@dataclass(frozen=True)
class StageRun:
    """A finished run of a stage, and the most memory that its process has had resident."""

    result: StageResult
    peak_memory_bytes: int


def run_stage(stage: Stage, artifact: Artifact | None, context: StageContext) -> StageRun:
    """Run a stage: in a child process if the checkpoint is large enough for that to pay, here otherwise.

    Raises:
        HfaccelError: as the stage raised it.
        ResourceError: memory or disk ran out, or the system killed the process.
        StageFault: anything else.
    """
    if context.source.weight_bytes < ISOLATED_FROM_BYTES:
        return _run_here(stage, artifact, context)
    with tempfile.TemporaryDirectory(prefix="hfaccel-") as name:
        folder = Path(name)
        with disk_errors(folder), (folder / _JOB).open("wb") as stream:
            pickle.dump((cast("Any", stage).__name__, artifact, replace(context, progress=_PipeProgress())), stream)
        status = _supervise(folder, context.progress)
        if not (folder / _RESULT).is_file():
            raise _death(stage.NAME, status)
        outcome = pickle.loads((folder / _RESULT).read_bytes())
    if isinstance(outcome, BaseException):
        raise outcome
    return cast("StageRun", outcome)


def _run_here(stage: Stage, artifact: Artifact | None, context: StageContext) -> StageRun:
    try:
        with disk_errors(context.workdir):
            return StageRun(stage.run(artifact, context), peak_memory_bytes())
    except MemoryError as error:
        raise ResourceError(
            f"out of memory during {stage.NAME}", where=context.source.id, hint="close other programs or use a larger machine"
        ) from error


def _supervise(folder: Path, progress: Progress) -> int:
    """Start the child, pass its progress on, and give its exit status (negative: the signal that ended it)."""
    command = [sys.executable, "-m", "hfaccel.isolation", str(folder)]
    # In a group of its own, so that Ctrl-C in a terminal reaches only the parent, which ends it without a traceback.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", process_group=0
    ) as child:
        assert child.stdout is not None  # asked for above
        try:
            for line in child.stdout:
                _pass_on(line, progress)
            return child.wait()
        finally:
            if child.poll() is None:
                child.kill()


def _death(stage: StageName, status: int) -> HfaccelError:
    if status == -signal.SIGKILL:
        return ResourceError(
            f"the system killed the process of the stage {stage}, most likely because memory ran out",
            where=stage,
            hint="close other programs or use a larger machine; finished stages are kept, the same command goes on from there",
        )
    cause = signal.Signals(-status).name if status < 0 else f"status {status}"
    return HfaccelError(
        f"the process of the stage {stage} ended with {cause} and left no result",
        where=stage,
        hint="a library crashed: try the versions that 'hfaccel doctor' lists, or report it with the output of --debug",
    )


class _PipeProgress:
    """Progress of a child process: one JSON list ``[method, arguments...]`` a line; without a stream it is silent."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def stage(self, name: StageName, index: int, total: int) -> None:
        """Only the pipeline starts stages, and it runs in the parent."""
        raise NotImplementedError("a stage cannot start another one")

    def step(self, text: str) -> None:
        """Send what is being done now."""
        self._send("step", text)

    def advance(self, done: int, total: int) -> None:
        """Send how much of the stage is done."""
        self._send("advance", done, total)

    def warn(self, text: str) -> None:
        """Send what the user must see."""
        self._send("warn", text)

    def _send(self, method: str, *arguments: str | int) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps([method, *arguments]) + "\n")
            self._stream.flush()


def _pass_on(line: str, progress: Progress) -> None:
    method, *arguments = json.loads(line)
    if method == "advance":
        progress.advance(*arguments)
    elif method == "warn":
        progress.warn(*arguments)
    else:
        progress.step(*arguments)


def _child(folder: Path) -> None:
    """The child's whole life: read the job, run the stage, write the result or the error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Libraries print; what they print must not be taken for progress.
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    outcome: StageRun | Exception
    try:
        module_name, artifact, context = pickle.loads((folder / _JOB).read_bytes())
        stage = cast("Stage", importlib.import_module(module_name))
        outcome = _run_here(stage, artifact, replace(context, progress=_PipeProgress(stream)))
    except HfaccelError as error:
        error.add_note(traceback.format_exc())
        outcome = error
    except Exception as error:
        outcome = StageFault(f"{type(error).__name__}: {error}")
        outcome.add_note(traceback.format_exc())
    temporary = folder / f"{_RESULT}.part"
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(folder / _RESULT)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock the interpreter needs to shut down
        pass
    os._exit(1)


if __name__ == "__main__":
    # The module that runs as __main__ is another one than the parent unpickles from.
    importlib.import_module("hfaccel.isolation")._child(Path(sys.argv[1]))
