"""``cache_bits: auto``: 8 bits where the attention can read them and the accuracy gate holds with them, float32 elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import hfaccel
from hfaccel.pipeline import CompileResult
from hfaccel.quant.build import cache_bits
from hfaccel.recipe.schema import Rung
from hfaccel.rewrites.graphs import load_graph, save_graph

OFF_TARGET = "cpu-arm-dotprod"
LADDER = "[{name: cached, scheme: weight-only, graph: fused, block_size: 32, cache_bits: auto}]"
Compile = Callable[..., CompileResult]


@pytest.fixture
def attentive(tiny_decoder: Path, enlarge: Callable[[torch.nn.Module], None], tmp_path: Path) -> Path:
    """Weights so large that the answers depend on what attention finds."""
    folder = shutil.copytree(tiny_decoder, tmp_path / "attentive")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    enlarge(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def compiled(attentive: Path, tmp_path: Path) -> Compile:
    def run(output: str, *, calibration: str, **options: object) -> CompileResult:
        texts = tmp_path / "texts.txt"
        texts.write_text(
            "".join(" ".join(f"word{(7 * line + place * place) % 70}" for place in range(40)) + "\n" for line in range(12))
        )
        seen = tmp_path / "seen.txt"
        seen.write_text(calibration or texts.read_text())
        overrides = [f"quantize.ladder={LADDER}", "accuracy.max_loss=0.01"]
        return hfaccel.compile(
            attentive, output=tmp_path / output, data=texts, calibration=seen, target=OFF_TARGET, use_cache=False,
            **{"overrides": overrides, **options},
        )  # fmt: skip

    return run


def dtype_of_cache(result: CompileResult) -> str:
    return next(spec["dtype"] for spec in result.manifest["contract"]["inputs"] if spec["name"] == "past_key_values.0.key")


def test_it_has_8_bits_where_the_gate_holds(compiled: Compile) -> None:
    result = compiled("out", calibration="")
    assert (result.manifest["chosen"], dtype_of_cache(result)) == ("cached", "int8")


def test_calibrated_on_a_single_word_it_stays_in_float_and_the_recipe_says_so(compiled: Compile) -> None:
    """Keys and values of all other words are far outside of what was seen, and would be clipped."""
    result = compiled("out", calibration="word5 word5 word5 word5\n" * 16)
    refused = next(item for item in result.manifest["candidates"] if item["name"] == "cached")
    assert refused["reason"] in ("loss-over-budget", "cosine-under-minimum", "agreement-under-minimum")
    assert (result.manifest["chosen"], dtype_of_cache(result)) == ("cached-float-cache", "float32")
    again = compiled("again", calibration="word5 word5 word5 word5\n" * 16, recipe=result.folder / "recipe.yaml", overrides=())
    assert [item["name"] for item in again.manifest["candidates"] if item["name"].startswith("cached")] == ["cached-float-cache"]
    assert (again.folder / "model.onnx").read_bytes() == (result.folder / "model.onnx").read_bytes()


def test_a_graph_whose_attention_cannot_read_integers_keeps_its_cache(compiled: Compile, tmp_path: Path) -> None:
    import onnx_ir

    graph = compiled("out", calibration="", precision="fp32").folder / "model.onnx"
    rung = Rung(name="cached", scheme="weight-only", graph="fused", cache_bits="auto")
    assert cache_bits(rung, graph) == 8
    model = load_graph(graph)
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert node.inputs[4] is not None
    model.graph.insert_before(node, same := onnx_ir.node("Identity", [node.inputs[4]], name="same"))
    node.replace_input_with(4, same.outputs[0])
    assert cache_bits(rung, save_graph(model, tmp_path)) is None
