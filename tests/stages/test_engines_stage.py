"""Engines through the whole pipeline: which candidates are built, what they share, and what the finished folder says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfaccel
from hfaccel.artifact.contract import SessionSettings
from hfaccel.rewrites.graphs import load_graph, operator_counts
from hfaccel.runtime.openvino_session import OpenVinoSession
from hfaccel.runtime.session import GraphSession

pytest.importorskip("openvino", reason="the package openvino is not installed")

IN_FLOAT32 = SessionSettings(engine="openvino")
OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed, so no candidate is dropped for its speed."""
STATIC = "scheme: static, graph: optimized, smooth: 0.75, outlier_neurons: 4"
LADDER = (
    f"quantize.ladder=[{{name: static, {STATIC}}}, {{name: openvino-static, {STATIC}, engine: openvino}}, "
    f"{{name: static-no-spinning, {STATIC}, allow_spinning: false}}, "
    "{name: openvino, scheme: none, graph: optimized, engine: openvino}, "
    "{name: openvino-bf16, scheme: none, graph: optimized, engine: openvino, inference_precision: bf16}]"
)


def compile_tiny(checkpoint: Path, output: Path, texts: Path, **options: Any) -> dict[str, Any]:
    overrides = (LADDER, "fuse.enabled=false", "quantize.fallback='off'", *options.pop("overrides", ()))
    made = hfaccel.compile(checkpoint, output=output, data=texts, target=OFF_TARGET, overrides=overrides, **options)
    return dict(made.manifest)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = (" ".join(f"word{number}" for number in random.integers(0, 90, random.integers(3, 30))) for _ in range(300))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rungs_share_one_graph_and_untimed_float_graphs_do_not_ship(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    manifest = compile_tiny(tiny_checkpoint, tmp_path / "out", texts, engines="onnxruntime,openvino")
    told = {item["name"]: item for item in manifest["candidates"]}
    assert told["openvino-bf16"]["reason"] == "not-supported-by-target"
    assert told["openvino"]["precision"] == "fp32"
    assert (told["openvino"]["quantized"], told["openvino"]["size_bytes"]) == (0, told["float"]["size_bytes"])
    assert told["openvino-static"]["quantized"] == told["static"]["quantized"] > 0
    assert told["openvino"]["verdict"]["passed"]
    assert told["static"]["verdict"]["examples"] == 300
    assert told["float"]["verdict"]["examples"] == 50  # parity has proved it, and there are no labels
    assert manifest["chosen"] in ("static", "static-no-spinning", "openvino-static")
    places = {(item["layer"], item["role"]) for item in told[manifest["chosen"]]["matmuls"]}
    assert places == {(layer, role) for layer in (0, 1) for role in ("query, key, value", "output", "up", "down")}
    [folder] = Path(os.environ["HFACCEL_CACHE"]).glob("stages/*/artifact/candidates/static-no-spinning")
    assert os.path.samefile(folder / "model.onnx", folder.parent / "static" / "model.onnx")
    ours, theirs = (operator_counts(load_graph(folder.parent / name / "model.onnx")) for name in ("static", "openvino-static"))
    assert (ours["MatMulIntegerToFloat"], ours.get("DequantizeLinear", 0)) == (told["static"]["quantized"], 0)
    assert theirs["DequantizeLinear"] > 0 == theirs.get("MatMulIntegerToFloat", 0)
    assert not (folder.parents[1] / "graphs").exists()


def test_a_folder_compiled_for_openvino_says_so_and_runs_in_it(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    manifest = compile_tiny(tiny_checkpoint, tmp_path / "out", texts, engines=["openvino"], precision="int8")
    assert (manifest["engine"], manifest["chosen"], manifest["precision"]) == ("openvino", "openvino-static", "int8")
    assert manifest["session"]["engine"] == "openvino"
    assert manifest["versions"]["openvino"]
    told = {item["name"]: item["reason"] for item in manifest["candidates"]}
    ours = dict.fromkeys(("static", "static-no-spinning"), "engine-not-wanted")
    assert told == {"openvino-static": None, "float": "not-better-than-chosen", **ours}
    model = hfaccel.load(tmp_path / "out")
    assert isinstance(model.runner, OpenVinoSession)
    ids = np.array([[2, 9, 11, 3]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    elsewhere = GraphSession(tmp_path / "out" / "model.onnx").run(feeds)["logits"]
    np.testing.assert_allclose(model.runner.run(feeds)["logits"], elsewhere, atol=0.05)


def test_by_default_another_engine_needs_a_measurement(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    manifest = compile_tiny(tiny_checkpoint, tmp_path / "out", texts)
    told = {item["name"]: item["reason"] for item in manifest["candidates"]}
    assert told["openvino"] == told["openvino-static"] == told["openvino-bf16"] == "engine-not-wanted"
    assert (manifest["chosen"], manifest["engine"]) == ("static", "onnxruntime")


def test_the_pinned_recipe_makes_the_same_model_for_the_same_engine(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    ladder = f"quantize.ladder=[{{name: any, {STATIC}, engine: openvino, inference_precision: auto}}]"
    first = compile_tiny(tiny_checkpoint, tmp_path / "out", texts, engines=["openvino"], overrides=(ladder,))
    assert (first["chosen"], first["session"]["inference_precision"]) == ("any", "f32")
    recipe = tmp_path / "out" / "recipe.yaml"
    again = hfaccel.compile(tiny_checkpoint, output=tmp_path / "again", data=texts, target=OFF_TARGET, recipe=recipe).manifest
    assert again["session"] == first["session"]
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()
    assert again["recipe"]["quantize"]["ladder"][0]["inference_precision"] == "f32"


def test_openvino_gets_fused_attention_without_a_branch(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """It cannot fuse across one, and onnxruntime still runs the file."""
    rungs = ("static, smooth: 0.75", "weight-only", "none")
    ladder = ", ".join(
        f"{{name: openvino-{number}, graph: fused, engine: openvino, scheme: {rung}}}" for number, rung in enumerate(rungs)
    )
    settings = (f"quantize.ladder=[{ladder}, {{name: static, graph: fused, scheme: static}}]", "quantize.fallback='off'")
    made = hfaccel.compile(
        tiny_checkpoint,
        output=tmp_path / "out",
        data=texts,
        target=OFF_TARGET,
        overrides=settings,
        engines=["openvino", "onnxruntime"],
    )
    told = {item["name"]: item for item in made.manifest["candidates"]}
    assert all(told[f"openvino-{number}"]["verdict"]["passed"] for number in range(len(rungs)))
    [folder] = Path(os.environ["HFACCEL_CACHE"]).glob("stages/*/artifact/candidates/openvino-2")
    names = (*(f"openvino-{number}" for number in range(len(rungs))), "static")
    counts = [operator_counts(load_graph(folder.parent / name / "model.onnx")) for name in names]
    assert [item["MultiHeadAttention"] for item in counts] == [2, 2, 2, 4]
    assert [item.get("If", 0) for item in counts] == [0, 0, 0, 2]
    ids = np.array([[2, 9, 11, 3], [2, 9, 3, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    graph = folder / "model.onnx"
    theirs, ours = (opened.run(feeds)["logits"] for opened in (OpenVinoSession(graph, IN_FLOAT32), GraphSession(graph)))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
