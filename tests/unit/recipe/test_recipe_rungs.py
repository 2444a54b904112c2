"""What a rung of the ladder says about engine and precision, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import RecipeError
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.load import load_recipe
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.targets import TARGETS
from hfaccel.stages.quantize import refusal

BY_NAME = {target.name: target for target in TARGETS}
RECIPE = load_recipe("encoder").recipe
BFLOAT16 = BY_NAME["cpu-avx512-bf16"]


def rung(**fields: Any) -> Rung:
    return Rung(**{"name": "one", "scheme": "static", "graph": "optimized", **fields})


@pytest.mark.parametrize(
    ("fields", "precision"),
    [
        ({}, "int8"),
        ({"engine": "openvino", "inference_precision": "bf16"}, "int8"),
        ({"scheme": "weight-only"}, "int8"),
        ({"scheme": "weight-only", "weight_only_bits": 4}, "int4"),
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
    assert first.quantization() == rung(name="two", smooth=0.5, allow_spinning=False).quantization()
    assert first.quantization() != rung(smooth=0.5, engine="openvino").quantization()  # engines have operators of their own
    blocks = rung(scheme="weight-only", engine="openvino", inference_precision="bf16")
    assert blocks.quantization() == rung(scheme="weight-only").quantization()
    encoders = {"smooth": 0.5, "encoder_engine": "openvino", "blockwise_decoder": True}
    assert rung(**encoders).quantization() != rung(smooth=0.5, blockwise_decoder=True).quantization()
    assert rung(**encoders).quantization() == rung(**encoders, disabled_optimizers=("GeluFusion",)).quantization()
    assert first.quantization() != rung(smooth=0.6).quantization()
    assert first.quantization() != rung(smooth=0.5, graph="fused").quantization()
    assert first.quantization() == rung(smooth=0.5, objectives=("size",)).quantization()
    assert rung(scheme="weight-only").quantization() != rung(scheme="weight-only", block_size=64).quantization()


def test_weight_only_needs_no_data_unless_something_else_does() -> None:
    for method in ("k-quant", "hqq"):
        assert not rung(scheme="weight-only", weight_only_bits=4, method=method, symmetric=False).needs_calibration
    for method in ("gptq", "quant-ease", "awq", "awq-quant-ease", "auto-round"):
        assert rung(scheme="weight-only", weight_only_bits=4, method=method, symmetric=False).needs_calibration
    assert rung(scheme="weight-only", smooth=0.5).needs_calibration


@pytest.mark.parametrize(
    "fields",
    [
        {"scheme": "weight-only", "smooth": 0.5, "outlier_neurons": 16, "quantize_embeddings": True},
        {"scheme": "weight-only", "weight_only_bits": 4, "block_size": 16, "symmetric": False, "method": "k-quant"},
        {"scheme": "weight-only", "engine": "openvino", "inference_precision": "auto"},
        {"scheme": "none", "engine": "openvino", "objectives": ("latency", "throughput")},
        {"graph": "fused", "engine": "openvino", "eight_bit_scores": True, "eight_bit_shares": 0.1},
        {
            "graph": "fused",
            "encoder_engine": "openvino",
            "blockwise_decoder": True,
            "eight_bit_scores": True,
            "eight_bit_convolutions": True,
            "disabled_optimizers": ("GeluFusion",),
        },
    ],
)
def test_what_goes_together(fields: dict[str, Any]) -> None:
    assert contradictions(rung(**fields)) == ()


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        ("scheme: static, inference_precision: bf16", "inference_precision", "onnxruntime cannot compute float graphs in bf16"),
        ("scheme: static, eight_bit_scores: true", "eight_bit_scores", "only static on the fused graph in openvino has them"),
        ("scheme: static, eight_bit_shares: 0.1", "eight_bit_shares", "only attention with eight_bit_scores has them"),
        ("scheme: static, eight_bit_convolutions: true", "eight_bit_convolutions", "only static in openvino has them"),
        (
            "scheme: static, encoder_engine: openvino",
            "encoder_engine",
            "the decoder stays with onnxruntime: give it blocks with blockwise_decoder",
        ),
        (
            "scheme: dynamic, encoder_engine: openvino",
            "encoder_engine",
            "only products of the scheme static are stored as another engine reads them",
        ),
        (
            "scheme: static, engine: openvino, encoder_engine: openvino, blockwise_decoder: true",
            "encoder_engine",
            "openvino runs all of an encoder already",
        ),
        ("scheme: static, engine: openvino, allow_spinning: false", "allow_spinning", "openvino has no such setting"),
        ("scheme: none, smooth: 0.5", "smooth", "a rung of scheme none quantizes nothing"),
        ("scheme: none, block_size: 64", "block_size", "a rung of scheme none quantizes nothing"),
        (
            "scheme: per-token, per_channel: false",
            "per_channel",
            "the scheme per-token has a scale per output channel, never one per tensor",
        ),
        (
            "scheme: per-token, engine: openvino",
            "engine",
            "only onnxruntime has products with a scale per token, openvino has none",
        ),
        ("scheme: per-token, method: gptq", "method", "the scheme per-token has no blocks"),
        ("scheme: dynamic, weight_only_bits: 4", "weight_only_bits", "the scheme dynamic has no blocks"),
        (
            "scheme: weight-only, outlier_matmuls: [one]",
            "outlier_matmuls",
            "the scheme weight-only has a scale for each token and block",
        ),
        ("scheme: static, symmetric: false", "symmetric", "the scheme static has no blocks"),
        ("scheme: static, method: awq", "method", "awq rounds weights in blocks; static has rtn and gptq"),
        (
            "scheme: weight-only, per_channel: false",
            "per_channel",
            "the scheme weight-only has a scale per block of a channel, never one per tensor",
        ),
        (
            "scheme: weight-only, calibration: percentile",
            "calibration",
            "the scheme weight-only takes activations as they come and calibrates no ranges",
        ),
        (
            "scheme: weight-only, method: k-quant",
            "method",
            "k-quant gives each block a zero point: symmetric must be false",
        ),
    ],
)
def test_a_contradiction_is_refused_by_its_key(text: str, key: str, what: str) -> None:
    ladder = f"quantize.ladder=[{{name: a, graph: optimized, {text}}}]"
    with pytest.raises(RecipeError) as caught:
        load_recipe("encoder", overrides=[ladder])
    assert str(caught.value) == f"--set: quantize.ladder.0.{key}: {what} (remove the key, or change engine or scheme)"


def test_all_contradictions_of_a_rung_are_named_at_once() -> None:
    found = contradictions(rung(scheme="weight-only", per_channel=False, calibration="percentile", method="k-quant"))
    assert [name for name, _ in found] == ["per_channel", "calibration", "method"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("block_size: 48", "block_size: 48 is not one of 16, 32, 64, 128, 256"),
        ("weight_only_bits: 2", "weight_only_bits: 2 is not one of 4, 8"),
        (
            "method: best",
            "method: 'best' is not one of rtn, k-quant, hqq, gptq, quant-ease, awq, awq-quant-ease, auto-round",
        ),
        ("objectives: [speed]", "objectives.0: 'speed' is not one of latency, throughput, size"),
    ],
)
def test_a_value_outside_the_set_is_refused_with_the_set(text: str, problem: str) -> None:
    ladder = f"quantize.ladder=[{{name: a, scheme: weight-only, graph: optimized, {text}}}]"
    with pytest.raises(RecipeError) as caught:
        load_recipe("encoder", overrides=[ladder])
    assert str(caught.value) == f"--set: quantize.ladder.0.{problem}"


def test_an_unknown_engine_of_the_recipe_is_refused_with_the_closest() -> None:
    with pytest.raises(RecipeError, match=r"command line: quantize\.engines.*'openvin' is not one of .*openvino"):
        load_recipe("encoder", sets={"quantize.engines": ["openvin"]})


def test_onnxruntime_is_never_refused_for_its_engine() -> None:
    for target in TARGETS:
        assert refusal(rung(), RECIPE, target, on_target=False) is None


def test_bfloat16_needs_a_target_that_has_it() -> None:
    made = rung(engine="openvino", inference_precision="bf16")
    refused = refusal(made, RECIPE, BY_NAME["cpu-avx512-vnni"], on_target=True)
    assert refused == ("not-supported-by-target", "cpu-avx512-vnni computes no bfloat16 matrix products in hardware")


def test_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    refused = refusal(rung(engine="openvino"), RECIPE, BFLOAT16, on_target=True)
    assert refused == ("engine-not-installed", "run: pip install 'hfaccel[openvino]'")


def test_an_engine_that_was_not_named_does_not_compete() -> None:
    ours = load_recipe("encoder", sets={"quantize.engines": ["onnxruntime"]}).recipe
    refused = refusal(rung(engine="openvino"), ours, BFLOAT16, on_target=True)
    assert refused == ("engine-not-wanted", "engines that may compete: onnxruntime (--engine)")


def test_off_the_target_another_engine_competes_only_when_named() -> None:
    refused = refusal(rung(engine="openvino"), RECIPE, BFLOAT16, on_target=False)
    assert refused is not None
    assert refused[0] == "engine-not-wanted"
    assert refused[1].startswith("openvino is chosen by measurement, and this host is not the target")
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    named = load_recipe("encoder", sets={"quantize.engines": ["onnxruntime", "openvino"]}).recipe
    assert refusal(rung(engine="openvino"), named, BFLOAT16, on_target=False) is None


@pytest.mark.parametrize(
    ("sets", "competes"),
    [
        ({"measure.objective": "latency"}, False),
        ({"measure.objective": "size"}, True),
        ({"measure.objective": "latency", "measure.max_size_bytes": 50_000_000}, True),
    ],
)
def test_a_rung_for_size_competes_where_size_counts(sets: dict[str, object], competes: bool) -> None:
    recipe = load_recipe("encoder", sets=sets).recipe
    refused = refusal(rung(objectives=("size",)), recipe, BFLOAT16, on_target=True)
    assert refused == (None if competes else ("not-for-objective", "competes only for the objective size (--objective)"))


@pytest.mark.parametrize(
    ("sets", "competes"),
    [
        ({"accuracy.max_loss": 0.01}, False),
        ({"accuracy.max_loss": 0.05}, True),
        ({"accuracy.max_loss": 0.01, "quantize.precision": "int4"}, True),  # demanded: its loss is to be seen
    ],
)
def test_a_rung_that_would_be_refused_is_not_built(sets: dict[str, object], competes: bool) -> None:
    recipe = load_recipe("decoder", sets=sets).recipe
    refused = refusal(rung(least_budget=0.05), recipe, BFLOAT16, on_target=True)
    assert (refused is None) == competes
    assert refused is None or refused[0] == "budget-too-small"
