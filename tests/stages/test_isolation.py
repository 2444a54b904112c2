"""A stage in its own process gives what it gives in this one, and its faults reach the user whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from hfaccel import isolation
from hfaccel.api import SilentProgress
from hfaccel.errors import GateError, HfaccelError, MissingExtraError, ResourceError
from hfaccel.request import CompileRequest, prepare
from hfaccel.stages import export
from hfaccel.stages.base import StageContext


class Recorder(SilentProgress):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def advance(self, done: int, total: int) -> None:
        self.steps.append(f"{done} of {total}")


@pytest.fixture
def context(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageContext:
    monkeypatch.setattr(isolation, "ISOLATED_FROM_BYTES", 0)
    plan = prepare(CompileRequest(str(tiny_checkpoint), tmp_path / "out"))
    (tmp_path / "work").mkdir()
    return StageContext(
        workdir=tmp_path / "work",
        source=plan.source,
        recipe=plan.recipe,
        target=plan.target,
        on_target=plan.on_target,
        artifacts={},
        dataset=None,
        calibration=(),
        metric=None,
        progress=Recorder(),
    )


def stage_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> types.ModuleType:
    """A stage written to disk, so that the child can import it by name."""
    (tmp_path / "planted_stage.py").write_text(f"NAME = 'quantize'\ndef run(artifact, ctx):\n    {body}\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    module = types.ModuleType("planted_stage")
    module.NAME = "quantize"  # type: ignore[attr-defined]
    return module


def test_a_stage_runs_in_a_child_and_reports_its_progress(context: StageContext) -> None:
    run = isolation.run_stage(export, None, context)
    assert run.result.artifact.graph_path.is_file()
    assert run.result.artifact.folder == context.workdir
    assert run.peak_memory_bytes > 50_000_000
    assert isinstance(context.progress, Recorder)
    assert "exporting with transformers" in context.progress.steps


def test_errors_arrive_with_their_class_text_and_advice(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "from hfaccel.errors import GateError; raise GateError('too far off', where='parity', hint='do this')"
    with pytest.raises(GateError) as caught:
        isolation.run_stage(stage_module(tmp_path, monkeypatch, body), None, context)  # type: ignore[arg-type]
    assert str(caught.value) == "parity: too far off (do this)"
    assert "planted_stage.py" in "".join(caught.value.__notes__)  # --debug shows where


def test_errors_whose_class_takes_other_arguments_travel_too(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "from hfaccel.errors import MissingExtraError; raise MissingExtraError('openvino', extra='openvino', needed_for='this')"
    )
    with pytest.raises(MissingExtraError, match=r"this needs the package 'openvino'.*pip install"):
        isolation.run_stage(stage_module(tmp_path, monkeypatch, body), None, context)  # type: ignore[arg-type]


def test_an_unexpected_fault_keeps_its_traceback(context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = stage_module(tmp_path, monkeypatch, "return {}['no such key']")
    with pytest.raises(isolation.StageFault, match="KeyError: 'no such key'") as caught:
        isolation.run_stage(module, None, context)  # type: ignore[arg-type]
    assert "planted_stage.py" in "".join(caught.value.__notes__)


def test_a_process_that_the_system_kills_is_a_clear_resource_error(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stage_module(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(
        ResourceError, match="the system killed the process of the stage quantize, most likely because memory ran out"
    ):
        isolation.run_stage(module, None, context)  # type: ignore[arg-type]


def test_a_library_that_crashes_is_named_by_its_signal(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stage_module(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(HfaccelError, match="the process of the stage quantize ended with SIGSEGV and left no result"):
        isolation.run_stage(module, None, context)  # type: ignore[arg-type]


def test_what_libraries_print_is_not_taken_for_progress(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "print('chatter'); ctx.progress.warn('mind this'); ctx.progress.advance(1, 3); import os; os.write(1, b'more'); raise MemoryError"
    with pytest.raises(ResourceError, match="out of memory during quantize"):
        isolation.run_stage(stage_module(tmp_path, monkeypatch, body), None, context)  # type: ignore[arg-type]
    assert isinstance(context.progress, Recorder)
    assert context.progress.warnings == ["mind this"]
    assert context.progress.steps == ["1 of 3"]


def test_small_checkpoints_stay_in_this_process(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "ISOLATED_FROM_BYTES", 1 << 40)
    seen: list[int] = []

    def run(artifact: object, ctx: StageContext) -> None:
        seen.append(os.getpid())

    module = types.ModuleType("here")
    module.run = run  # type: ignore[attr-defined]
    isolation.run_stage(module, None, replace(context))  # type: ignore[arg-type]
    assert seen == [os.getpid()]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """Kill the parent outright; the child notices the closed pipe and ends, so no compile goes on unseen."""
    (tmp_path / "sleeper.py").write_text(
        "NAME = 'export'\ndef run(artifact, ctx):\n    import os, time, pathlib\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n    time.sleep(600)\n",
        encoding="utf-8",
    )
    (tmp_path / "parent.py").write_text(
        "import pathlib, pickle, types\nfrom hfaccel import isolation\nfrom hfaccel.api import SilentProgress\n"
        "class Source: weight_bytes = 1 << 40\n"
        "import dataclasses\nfrom hfaccel.stages.base import StageContext\n"
        "context = StageContext(pathlib.Path('.'), types.SimpleNamespace(weight_bytes=1 << 40), None, None, False, {}, None, (), None,"
        " SilentProgress())\n"
        "isolation.run_stage(__import__('sleeper'), None, context)\n",
        encoding="utf-8",
    )
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    pid_file = tmp_path / "pid"
    _wait(lambda: pid_file.is_file() and bool(pid_file.read_text()))
    child = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return False


def _wait(condition: object, seconds: float = 60.0) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
