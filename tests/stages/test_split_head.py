"""The rows of rare tokens are a product of their own, which may be coarser; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from hfaccel.artifact.contract import SessionSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.quant.build import build_candidate
from hfaccel.quant.layers import HEAD_PARTS, has_eight_bits, part_of
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.split_head import split_head
from hfaccel.quant.weight_only import read_blocks
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, new_initializer, save_graph
from hfaccel.rewrites.last_token_logits import all_token_logits, last_token_logits
from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME, Decoder
from hfaccel.runtime.session import GraphSession
from hfaccel.stages.exporters import quiet_exporters

WORDS = 600
FIRST, LAST = 96, 16
"""A sixth and a 32nd of them, as many as kernels compute at once."""
CACHE = GenerationSettings(2, 2, 16, 64, WORDS, (), 0)
FOUR_BITS = Rung(
    name="four",
    scheme="weight-only",
    graph="fused",
    weight_only_bits=4,
    block_size=32,
    symmetric=False,
    method="gptq",
    eight_bit=("head",),
    split_head=True,
)


def head(tokens: int, *, bias: bool = False) -> onnx_ir.Model:
    """hidden [batch, sequence, 32] -> logits [batch, sequence, tokens]."""
    numbers = np.random.default_rng(0)
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="head"), ir_version=9)
    hidden = onnx_ir.val("hidden", onnx_ir.DataType.FLOAT, ["batch", "sequence", 32])
    weight = new_initializer(model, "lm_head.weight_t", numbers.normal(size=(32, tokens)).astype(np.float32))
    product = onnx_ir.node("MatMul", [hidden, weight], name="head")
    model.graph.append(product)
    result = product.outputs[0]
    if bias:
        added = onnx_ir.node("Add", [result, new_initializer(model, "bias", numbers.normal(size=tokens).astype(np.float32))])
        model.graph.append(added)
        result = added.outputs[0]
    result.name, result.type = "logits", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    result.shape = onnx_ir.Shape(["batch", "sequence", tokens])
    model.graph.inputs.append(hidden)
    model.graph.outputs.append(result)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [512, 600, 997])
def test_a_head_in_parts_gives_the_same_logits(tokens: int, bias: bool, tmp_path: Path) -> None:
    def logits(model: onnx_ir.Model, folder: Path) -> np.ndarray:
        folder.mkdir()
        hidden = np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32)
        return GraphSession(save_graph(model, folder)).run({"hidden": hidden})["logits"]

    model = head(tokens, bias=bias)
    before = logits(model, tmp_path / "before")
    assert split_head(model) == {"head": tuple(f"head{part}" for part in HEAD_PARTS)}
    np.testing.assert_allclose(logits(model, tmp_path / "after"), before, rtol=1e-5, atol=1e-5)


def test_both_ends_of_the_vocabulary_are_not_rare() -> None:
    model = head(WORDS)
    split_head(model)
    widths = {node.name: node.inputs[1].const_value.shape[1] for node in model.graph if node.op_type == "MatMul"}  # type: ignore[union-attr]
    assert list(widths.values()) == [FIRST, WORDS - FIRST - LAST, LAST]


def test_a_small_vocabulary_is_left_whole() -> None:
    model = head(500)
    assert split_head(model) == {}
    assert [node.op_type for node in model.graph] == ["MatMul"]


@pytest.mark.parametrize("weight", ["lm_head.weight_t", "model.embed_tokens.weight_untied", "embed_tokens.weight_untied_rotated"])
def test_parts_belong_to_the_head_and_rare_tokens_have_no_eight_bits(weight: str) -> None:
    assert {part_of(weight + part) for part in HEAD_PARTS} == {"head"}
    assert [has_eight_bits(weight + part, ["head"]) for part in HEAD_PARTS] == [True, False, True]


def test_eight_bits_have_no_rare_tokens() -> None:
    rung = Rung(name="eight", scheme="weight-only", graph="fused", split_head=True)
    assert contradictions(rung) == (("split_head", "every MatMul has 8 bits"),)
    assert contradictions(FOUR_BITS) == ()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose head reads the last token, as the optimize stage leaves it."""
    import mobius
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    }
    config = transformers.LlamaConfig(vocab_size=WORDS, **sizes, max_position_embeddings=64, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder)
    with quiet_exporters():
        model = mobius.build(str(folder), task="text-generation", dtype="f32", execution_provider="cpu")["model"]
    assert last_token_logits(model) == 1
    return save_graph(model, folder)


def calibration() -> CalibrationData:
    from hfaccel.evaluate.cached_decoding import empty_past

    ids = np.random.default_rng(3).integers(1, WORDS, (8, 40))
    return CalibrationData([{"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(len(ids), CACHE)}], {})


def built(llama: Path, folder: Path, **changes: object) -> Path:
    rung = FOUR_BITS.model_copy(update=changes)
    return build_candidate(rung, llama, calibration(), weights=WeightFormat(sums_in_16_bits=True), folder=folder).path


def test_rare_tokens_have_four_bits_and_the_others_eight(llama: Path, tmp_path: Path) -> None:
    nodes = {node.name or "": node for node in load_graph(built(llama, tmp_path)).graph if node.op_type == "MatMulNBits"}
    bits = {
        next(part for part in HEAD_PARTS if name.endswith(part)): nodes[name].attributes.get_int("bits", 0)
        for name in nodes
        if name.endswith(HEAD_PARTS)
    }
    assert bits == {"_first_tokens": 8, "_rare_tokens": 4, "_last_tokens": 8}


def test_logits_of_rare_tokens_alone_are_coarser_and_the_last_token_of_a_row_is_still_found(llama: Path, tmp_path: Path) -> None:
    rows = [np.random.default_rng(row).integers(1, WORDS, 20 + 5 * row).tolist() for row in range(2)]
    folders = {name: tmp_path / name for name in ("whole", "parts")}
    for folder in folders.values():
        folder.mkdir()
    graphs = (llama, built(llama, folders["whole"], split_head=False), built(llama, folders["parts"]))
    exact, whole, parts = (Decoder(graph, SessionSettings(), CACHE).prefill(rows).logits for graph in graphs)
    rare = np.r_[FIRST : WORDS - LAST]
    frequent = np.r_[:FIRST, WORDS - LAST : WORDS]
    np.testing.assert_array_equal(parts[:, frequent], whole[:, frequent])
    errors = [np.abs(given[:, rare] - exact[:, rare]).mean() for given in (whole, parts)]
    assert errors[0] < errors[1] < 0.3 * np.abs(exact[:, rare]).mean()
    assert all_token_logits(load_graph(graphs[2])) == 1


def test_a_graph_for_prompts_has_rows_of_its_own_for_rare_tokens(llama: Path, tmp_path: Path) -> None:
    path = built(llama, tmp_path, rotate=True, prompt_graph=True)
    prompts = [node for node in load_graph(path.with_name(PROMPT_GRAPH_NAME)).graph if HEAD_PARTS[1] in (node.name or "")]
    assert "MatMulNBits" not in [node.op_type for node in prompts]
    assert "MatMulIntegerToFloat" in [node.op_type for node in prompts]


def test_calibration_texts_make_up_for_the_rounding_of_rare_tokens(llama: Path, tmp_path: Path) -> None:
    """GPTQ rounds them by what the head reads, not to the nearest."""
    levels = []
    for method in ("gptq", "rtn"):
        (tmp_path / method).mkdir()
        graph = load_graph(built(llama, tmp_path / method, method=method)).graph
        levels.append(read_blocks(next(node for node in graph if (node.name or "").endswith(HEAD_PARTS[1]))).levels)
    assert (levels[0] != levels[1]).mean() > 0.02
