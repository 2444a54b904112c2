"""The final race, and limits on time and size, through the whole pipeline on this host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hfaccel
from hfaccel.errors import GateError, SettingsError
from hfaccel.runtime.cores import physical_cores

QUICK: dict[str, Any] = {"workload": "1x8,2x16", "engines": "onnxruntime"}
OVERRIDES = ("measure.seconds_per_point=0.02", "quantize.fallback='off'")


def compile_tiny(checkpoint: Path, data: Path, output: Path, **options: Any) -> dict[str, Any]:
    made = hfaccel.compile(checkpoint, output=output, data=data, overrides=OVERRIDES, **{**QUICK, **options})
    return dict(made.manifest)


def test_what_holds_the_accuracy_gate_is_timed_in_one_race(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfaccel.stages.race.REMATCHES", 0)  # who meets the float graph again has another time of it
    manifest = compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "out", max_loss=0.5)
    timed = [item for item in manifest["candidates"] if item["timings"]]
    finalists = [item for item in timed if item["finalist"]]
    assert {"float", manifest["chosen"]} <= {item["name"] for item in finalists}
    assert all(item["finalist"] for item in timed if item["reason"] in (None, "not-better-than-chosen"))
    for index in range(2):  # one run: the float graph has one time
        assert len({item["timings"][index]["parent_ms"] for item in finalists if item["reason"] != "slower-than-parent"}) == 1
    assert all(timing["candidate_p95_ms"] >= timing["candidate_ms"] for item in finalists for timing in item["timings"])
    shipped = next(item for item in manifest["candidates"] if item["name"] == manifest["chosen"])
    assert any(item["pareto"] for item in manifest["candidates"])
    assert shipped["finalist"]


def test_a_limit_on_size_that_nothing_keeps_is_an_error_that_tells_sizes(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(GateError) as caught:
        compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "out", max_size_bytes=1000)
    assert "no candidate keeps the limits and holds all gates. float: size-over-limit (0.3 MB of graph and weights" in str(
        caught.value
    )
    assert "--max-size" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_a_limit_on_size_keeps_the_float_graph_from_shipping(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    free = compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "free", max_loss=0.5, target="cpu-arm-dotprod")
    sizes = {item["name"]: item["size_bytes"] for item in free["candidates"] if item["size_bytes"]}
    limit = sizes["float"] - 1
    manifest = compile_tiny(
        tiny_checkpoint, tiny_data, tmp_path / "out", max_loss=0.5, target="cpu-arm-dotprod", max_size_bytes=limit
    )
    told = {item["name"]: item["reason"] for item in manifest["candidates"]}
    assert told["float"] == "size-over-limit"
    assert sizes[manifest["chosen"]] <= limit


def test_a_limit_on_time_that_nothing_keeps_names_the_times(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GateError, match=r"float: p95-over-limit \(95 of 100 runs took up to: 1x8 .* ms, 2x16 .* ms; limit 0\.0001 ms"
    ):
        compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "out", max_loss=0.5, max_p95_ms=0.0001)


def test_a_limit_on_time_that_all_keep_changes_nothing(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    manifest = compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "out", max_loss=0.5, max_p95_ms=60_000.0)
    assert all(item["reason"] != "p95-over-limit" for item in manifest["candidates"])


def test_a_limit_on_time_off_the_target_is_refused_before_any_work(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="this host is not the target cpu-arm-dotprod"):
        compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "out", target="cpu-arm-dotprod", max_p95_ms=20.0)


def test_the_artifact_runs_with_the_threads_that_were_asked_for(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    manifest = compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "out", max_loss=0.5, threads=1)
    assert manifest["session"]["intra_op_num_threads"] == 1
    assert manifest["recipe"]["measure"]["threads"] == 1


def test_fewer_threads_are_timed_and_what_was_found_is_kept(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    manifest = compile_tiny(tiny_checkpoint, tiny_data, tmp_path / "out", max_loss=0.5)
    accuracy = next(record for record in manifest["stages"] if record["stage"] == "accuracy")
    found, stored = accuracy["metrics"]["threads"], manifest["session"]["intra_op_num_threads"]
    assert found["cores"] == physical_cores()
    assert len(found["trials"]) == 0 or found["trials"][0]["against"] == found["cores"]
    assert (stored or found["cores"]) == found["count"]
    if found["count"] < found["cores"]:
        assert all(trial["lower_bound"] >= 1.03 for trial in found["trials"] if trial["count"] >= found["count"])
