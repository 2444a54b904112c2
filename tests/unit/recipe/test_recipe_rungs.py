"""What a rung of the ladder says about engine and precision, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import RecipeError
from hfaccel.recipe.load import load_recipe
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.targets import TARGETS
from hfaccel.stages.quantize import refusal

BY_NAME = {target.name: target for target in TARGETS}
QUANTIZE = load_recipe("encoder").recipe.quantize
BFLOAT16 = BY_NAME["cpu-avx512-bf16"]


def rung(**fields: Any) -> Rung:
    return Rung(**{"name": "one", "scheme": "static", "graph": "optimized", **fields})


@pytest.mark.parametrize(
    ("fields", "precision"),
    [
        ({}, "int8"),
        ({"engine": "openvino", "inference_precision": "bf16"}, "int8"),
        ({"scheme": "none", "engine": "openvino"}, "fp32"),
        ({"scheme": "none", "engine": "openvino", "inference_precision": "bf16"}, "bf16"),
    ],
)
def test_precision(fields: dict[str, Any], precision: str) -> None:
    assert rung(**fields).precision == precision


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "f32")])
def test_auto_is_bfloat16_where_the_target_has_it(bf16: bool, precision: str) -> None:
    made = rung(engine="openvino", inference_precision="auto").for_target(bf16=bf16)
    assert made.session() == SessionSettings(engine="openvino", inference_precision=precision)  # type: ignore[arg-type]
    assert rung().for_target(bf16=bf16) == rung()


def test_session_of_a_rung() -> None:
    assert rung().session() == SessionSettings()
    made = rung(engine="openvino", inference_precision="bf16").session()
    assert made == SessionSettings(engine="openvino", inference_precision="bf16")
    ours = rung(disabled_optimizers=("GeluFusion",), allow_spinning=False, graph_optimization_level="basic").session()
    assert ours == SessionSettings(0, False, ("GeluFusion",), graph_optimization_level="basic")


def test_rungs_that_differ_in_how_they_run_share_a_graph() -> None:
    first = rung(smooth=0.5, disabled_optimizers=("GeluFusion",))
    second = rung(name="two", smooth=0.5, engine="openvino", inference_precision="bf16")
    assert first.quantization() == second.quantization()
    assert first.quantization() != rung(smooth=0.6).quantization()
    assert first.quantization() != rung(smooth=0.5, graph="fused").quantization()


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        ("scheme: static, inference_precision: bf16", "inference_precision", "onnxruntime cannot compute float graphs in bf16"),
        ("scheme: static, engine: openvino, allow_spinning: false", "allow_spinning", "openvino has no such setting"),
        ("scheme: none, smooth: 0.5", "smooth", "a rung of scheme none quantizes nothing"),
    ],
)
def test_a_contradiction_is_refused_by_its_key(text: str, key: str, what: str) -> None:
    ladder = f"quantize.ladder=[{{name: a, graph: optimized, {text}}}]"
    with pytest.raises(RecipeError) as caught:
        load_recipe("encoder", overrides=[ladder])
    assert str(caught.value) == f"--set: quantize.ladder.0.{key}: {what} (remove the key, or change engine or scheme)"


def test_an_unknown_engine_of_the_recipe_is_refused_with_the_closest() -> None:
    with pytest.raises(RecipeError, match=r"command line: quantize\.engines.*'openvin' is not one of .*openvino"):
        load_recipe("encoder", sets={"quantize.engines": ["openvin"]})


def test_onnxruntime_is_never_refused_for_its_engine() -> None:
    for target in TARGETS:
        assert refusal(rung(), QUANTIZE, target, on_target=False) is None


def test_bfloat16_needs_a_target_that_has_it() -> None:
    made = rung(engine="openvino", inference_precision="bf16")
    refused = refusal(made, QUANTIZE, BY_NAME["cpu-avx512-vnni"], on_target=True)
    assert refused == ("not-supported-by-target", "cpu-avx512-vnni computes no bfloat16 matrix products in hardware")


def test_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    refused = refusal(rung(engine="openvino"), QUANTIZE, BFLOAT16, on_target=True)
    assert refused == ("engine-not-installed", "run: pip install 'hfaccel[openvino]'")


def test_an_engine_that_was_not_named_does_not_compete() -> None:
    ours = load_recipe("encoder", sets={"quantize.engines": ["onnxruntime"]}).recipe.quantize
    refused = refusal(rung(engine="openvino"), ours, BFLOAT16, on_target=True)
    assert refused == ("engine-not-wanted", "engines that may compete: onnxruntime (--engine)")


def test_off_the_target_another_engine_competes_only_when_named() -> None:
    refused = refusal(rung(engine="openvino"), QUANTIZE, BFLOAT16, on_target=False)
    assert refused is not None
    assert refused[0] == "engine-not-wanted"
    assert refused[1].startswith("openvino is chosen by measurement, and this host is not the target")
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    named = load_recipe("encoder", sets={"quantize.engines": ["onnxruntime", "openvino"]}).recipe.quantize
    assert refusal(rung(engine="openvino"), named, BFLOAT16, on_target=False) is None
