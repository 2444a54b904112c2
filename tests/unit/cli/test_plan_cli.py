"""Plan on a checkpoint that no stage could run: it reads files and the cache, and loads nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from typer.testing import CliRunner

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.contract import Contract, TextSettings
from hfaccel.artifact.store import StageCache
from hfaccel.cli.plan import plan
from hfaccel.errors import HfaccelError
from hfaccel.pipeline import stage_key, stages_of
from hfaccel.request import CompileRequest, prepare
from hfaccel.stages.base import STAGES, Stage

CONTRACT = Contract("text-classification", (), (), TextSettings(max_length=8, pad_token_id=0), ("NO", "YES"))
WEIGHT_BYTES = 4000
RunPlan = Callable[..., dict[str, Any]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 30, "hidden_size": 32}
    more = {"num_hidden_layers": 2, "max_position_embeddings": 64, "id2label": {"0": "NO", "1": "YES"}}
    (folder / "config.json").write_text(json.dumps({**config, **more}), encoding="utf-8")
    tensors = {"a": {"dtype": "F32", "shape": [WEIGHT_BYTES // 4], "data_offsets": [0, WEIGHT_BYTES]}}
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(WEIGHT_BYTES))
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": []}), encoding="utf-8")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run_plan(checkpoint: Path, cache: Path, tmp_path: Path) -> RunPlan:
    app = typer.Typer()
    app.command()(plan)

    def run(*arguments: str) -> dict[str, Any]:
        given = [str(checkpoint), "-o", str(tmp_path / "out"), "--json", *arguments]
        result = CliRunner().invoke(app, given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return cast("dict[str, Any]", json.loads(result.stdout))

    return run


def fill(checkpoint: Path, cache: Path, count: int, **record: float) -> None:
    """Results of the first ``count`` stages, as a compile would have left them."""
    made = prepare(CompileRequest(model=str(checkpoint), output=checkpoint.parent / "out"))
    artifact: Artifact | None = None
    with StageCache(cache) as store:
        for module, _ in stages_of(made)[:count]:
            stage = cast("Stage", module)
            key = stage_key(stage, artifact, made)
            with store.writing(key) as temporary:
                folder = temporary / "artifact"
                (folder / "model.onnx").write_text(stage.NAME)
                artifact = Artifact(folder, "model.onnx", "fp32", CONTRACT, record_files(folder))
                store.write_record(temporary, artifact, {"stage": stage.NAME, **record})


def states(report: dict[str, Any]) -> list[str]:
    return [stage["state"] for stage in report["stages"]]


def test_an_empty_cache(run_plan: RunPlan, tmp_path: Path) -> None:
    report = run_plan()
    assert [stage["stage"] for stage in report["stages"]] == list(STAGES)
    assert states(report) == ["runs", "unknown", "unknown", "unknown", "unknown"]
    assert [stage["waits_for"] for stage in report["stages"]] == [None, *STAGES[:-1]]
    assert {stage["cost"]["basis"] for stage in report["stages"]} == {"estimate"}
    assert report["seconds"] == pytest.approx(sum(stage["cost"]["seconds"] for stage in report["stages"]), abs=0.1)
    assert report["peak_memory_bytes"] == max(stage["cost"]["peak_memory_bytes"] for stage in report["stages"])
    assert report["cache_bytes"] == sum(stage["cost"]["size_bytes"] for stage in report["stages"]) > 0
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_hits_then_a_miss_then_what_cannot_be_known(run_plan: RunPlan, checkpoint: Path, cache: Path) -> None:
    fill(checkpoint, cache, 2)
    report = run_plan()
    assert states(report) == ["cached", "cached", "runs", "unknown", "unknown"]
    assert [stage["cost"] is None for stage in report["stages"]] == [True, True, False, False, False]
    assert report["stages"][3]["waits_for"] == "fuse"
    # Another setting of the first stage misses from there on.
    assert states(run_plan("--set", "export.opset=18"))[0] == "runs"


def test_everything_from_the_cache_costs_nothing(run_plan: RunPlan, checkpoint: Path, cache: Path) -> None:
    fill(checkpoint, cache, 5)
    report = run_plan()
    assert states(report) == ["cached"] * 5
    assert (report["seconds"], report["peak_memory_bytes"], report["cache_bytes"]) == (0, 0, 0)
    assert states(run_plan("--no-cache")) == ["runs"] * 5
    assert states(run_plan("--max-loss", "5%")) == [*["cached"] * 4, "runs"]


def test_a_stage_that_is_switched_off(run_plan: RunPlan) -> None:
    report = run_plan("--set", "quantize.enabled=false")
    assert states(report) == ["runs", "unknown", "unknown", "skipped", "unknown"]
    assert report["stages"][4]["waits_for"] == "fuse"
    assert report["candidates"] == []


@pytest.mark.parametrize(("other_bytes", "basis"), [(1, "measured in an earlier run"), (100, "estimate")])
def test_an_earlier_run_of_like_size_counts_more_than_the_formula(
    run_plan: RunPlan, checkpoint: Path, cache: Path, other_bytes: int, basis: str
) -> None:
    weight_bytes = (checkpoint / "model.safetensors").stat().st_size
    measured = {"seconds": 77.0, "peak_memory_bytes": 123_456_789, "size_bytes": 5555}
    fill(checkpoint, cache, 1, weight_bytes=weight_bytes * other_bytes, **measured)
    cost = run_plan("--set", "export.opset=18")["stages"][0]["cost"]
    assert cost["basis"] == basis
    if basis != "estimate":
        assert cost == {**measured, "basis": basis}


def test_problems_are_those_of_compile(run_plan: RunPlan) -> None:
    with pytest.raises(HfaccelError) as caught:
        run_plan("--metric", "guess", "--precision", "int9")
    assert caught.value.exit_code == 2
    assert "metric: unknown metric 'guess'" in str(caught.value)
    assert "int9" in str(caught.value)


def test_the_table_says_what_figures_are(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from hfaccel.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None)\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'scipy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "plan", str(checkpoint), "-o", str(tmp_path / "out")]
    environment = {**os.environ, "HFACCEL_CACHE_LIMIT": "0"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    for text in ("unknown until export has run", "estimate", "GB at the peak", "cache: the limit is 0.0 GB"):
        assert text in process.stdout
    assert process.stdout.splitlines()[-1] == "[]"
