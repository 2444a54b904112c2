"""From argv to a folder, as a user runs it: a tiny random BERT, real processes, real exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAST = ("--workload", "1x8", "--set", "measure.seconds_per_point=0.05")


def hfaccel(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HFACCEL_CACHE": str(cache)}
    command = [sys.executable, "-m", "hfaccel", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def cache(tiny_cache: Path) -> Path:
    return tiny_cache


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint


@pytest.fixture
def data(tiny_data: Path) -> Path:
    return tiny_data


@pytest.fixture
def compiled(tiny_compiled: tuple[Path, dict[str, Any]]) -> Path:
    return tiny_compiled[0]


def test_first_run_goes_through_all_stages(tiny_compiled: tuple[Path, dict[str, Any]]) -> None:
    manifest = tiny_compiled[1]
    assert manifest["up_to_date"] is False
    assert [record["stage"] for record in manifest["stages"]] == ["export", "optimize", "fuse", "quantize", "accuracy"]
    assert {record["status"] for record in manifest["stages"]} == {"done"}


def test_artifact_holds_what_the_design_lists(compiled: Path) -> None:
    names = {path.name for path in compiled.iterdir()}
    assert {
        "manifest.json",
        "model.onnx",
        "config.json",
        "tokenizer.json",
        "golden",
        "report.html",
        "report.md",
        "README.md",
    } <= names
    manifest = json.loads((compiled / "manifest.json").read_text(encoding="utf-8"))
    dropped = [candidate for candidate in manifest["candidates"] if candidate["detail"] != "chosen"]
    assert all(candidate["reason"] and candidate["detail"] for candidate in dropped)
    assert manifest["recipe_origins"]["measure.seconds_per_point"] == "--set"


def test_second_run_takes_every_stage_from_the_cache(checkpoint: Path, data: Path, cache: Path, compiled: Path) -> None:
    before = (compiled / "manifest.json").stat().st_mtime_ns
    process = hfaccel("compile", checkpoint, "-o", compiled, "--data", data, *FAST, cache=cache)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("unchanged, from the cache") == 5
    assert "is up to date" in process.stdout
    assert (compiled / "manifest.json").stat().st_mtime_ns == before


def test_another_setting_reruns_only_what_follows_it(
    checkpoint: Path, data: Path, cache: Path, compiled: Path, tmp_path: Path
) -> None:
    process = hfaccel("compile", checkpoint, "-o", tmp_path / "b", "--data", data, "--max-loss", "50%", *FAST, cache=cache)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("unchanged, from the cache") == 4


def test_existing_output_is_left_alone_without_force(checkpoint: Path, cache: Path, compiled: Path) -> None:
    before = (compiled / "manifest.json").read_bytes()
    process = hfaccel("compile", checkpoint, "-o", compiled, "--precision", "fp32", *FAST, cache=cache)
    assert process.returncode == 3
    assert "replace it with --force" in process.stderr
    assert (compiled / "manifest.json").read_bytes() == before


def test_run_answers_like_transformers(checkpoint: Path, compiled: Path, cache: Path) -> None:
    from transformers import pipeline

    process = hfaccel("run", compiled, "word1 word2 word3", "--json", cache=cache)
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    expected = pipeline("text-classification", model=str(checkpoint))("word1 word2 word3")[0]
    assert expected["label"] in json.dumps(answer)


def test_verify_names_the_file_with_the_flipped_byte(compiled: Path, cache: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    assert hfaccel("verify", copy, cache=cache).returncode == 0
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(bytes(content))
    process = hfaccel("verify", copy, cache=cache)
    assert process.returncode == 9
    assert "model.onnx: content changed" in process.stderr


def test_inspect_prints_the_manifest(compiled: Path, cache: Path) -> None:
    process = hfaccel("inspect", compiled, "--json", cache=cache)
    assert json.loads(process.stdout) == json.loads((compiled / "manifest.json").read_text(encoding="utf-8"))
    assert "model.onnx" not in hfaccel("inspect", compiled, cache=cache).stderr


def test_without_data_packaged_texts_calibrate_and_the_user_is_told(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    process = hfaccel("compile", checkpoint, "-o", tmp_path / "c", *FAST, "--json", cache=cache)
    assert process.returncode == 0, process.stderr
    made = json.loads(process.stdout)
    assert "needs-calibration-data" not in {item["reason"] for item in made["candidates"]}
    static = next(item for item in made["candidates"] if item["name"] == "static")
    assert static["size_bytes"] > 0
    assert any("calibrated on packaged texts" in notice for notice in made["notices"])
    assert "packaged multilingual sample" in process.stderr


def test_plan_loads_no_weights(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    process = hfaccel("plan", checkpoint, "-o", tmp_path / "d", "--json", cache=cache)
    assert process.returncode == 0, process.stderr
    plan = json.loads(process.stdout)
    assert plan["task"] == "text-classification"
    assert not (tmp_path / "d").exists()
