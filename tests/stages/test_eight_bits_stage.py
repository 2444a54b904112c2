"""A decoder with one MatMul that 4 bits ruin: the search gives 8 to that one, and the recipe repeats what it found."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfaccel
from hfaccel.errors import GateError, RecipeError
from hfaccel.pipeline import CompileResult
from hfaccel.quant.build import build_candidate
from hfaccel.quant.more_bits import float_weights, write_with_eight_bits
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.weight_only import read_blocks
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, new_initializer, save_graph
from hfaccel.stages import eight_bits
from hfaccel.stages.eight_bits import BUDGET_SHARES, left_to_try, sets_in_order

OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed."""
WORDS, LAYERS, FRAGILE = 100, 3, 1
HIDDEN, INTERMEDIATE = 64, 128
LOUD = 16
"""How many times larger one weight of each block is: 4 bits leave nothing of the others, 8 bits some."""
GPTQ = (
    "quantize.ladder=[{name: four, scheme: weight-only, graph: fused, weight_only_bits: 4, block_size: 32, symmetric: false, "
    "method: gptq, quantize_embeddings: true}]"
)
BUDGET = 0.05


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., None]) -> Path:
    """A Llama in whose layer 1 every 32nd neuron is as quiet as its reader is loud: the same function."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("planted") / "model"
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": INTERMEDIATE}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, **sizes, max_position_embeddings=128, bos_token_id=None, eos_token_id=3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
        block = model.model.layers[FRAGILE].mlp
        block.up_proj.weight[::32] /= LOUD
        block.down_proj.weight[:, ::32] *= LOUD
        block.down_proj.weight *= 3  # so that the block matters
    model.save_pretrained(folder)
    write_tokenizer(folder, settings={"model_max_length": 128})
    return folder


@pytest.fixture(scope="module")
def texts(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model itself says: only then is a divergence a loss."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(planted)
    start = torch.randint(5, WORDS, (64, 1))
    said = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=60, min_new_tokens=60)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = (" ".join(f"word{token - 5}" for token in row if token >= 5) for row in said.tolist())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def searched(planted: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> CompileResult:
    return compile_planted(planted, texts, tmp_path_factory.mktemp("searched") / "out", overrides=(GPTQ,))


def compile_planted(planted: Path, texts: Path, output: Path, **options: Any) -> CompileResult:
    options = {"max_loss": BUDGET, **options}
    return hfaccel.compile(planted, output=output, data=texts, target=OFF_TARGET, precision="int4", **options)


def test_the_fragile_one_gets_eight_bits_and_most_others_keep_four(searched: CompileResult) -> None:
    candidates = {item["name"]: item for item in searched.manifest["candidates"]}
    assert candidates["four"]["reason"] == "loss-over-budget"
    mixed = candidates["four-mixed"]
    assert searched.manifest["chosen"] == "four-mixed"
    assert mixed["verdict"]["losses"][0]["upper_bound"] <= BUDGET
    eight = {(item["layer"], item["role"]) for item in mixed["matmuls"] if item["precision"] == "int8"}
    assert (FRAGILE, "down") in eight
    assert len(eight) == len(mixed["eight_bit"]) < len(mixed["matmuls"]) / 2
    assert f"layers.{FRAGILE}/mlp/down_proj" in mixed["eight_bit"][0][0]
    assert f"{len(eight)} of them in int8" in (searched.folder / "report.md").read_text(encoding="utf-8")


def test_the_graph_has_what_the_report_says(searched: CompileResult) -> None:
    mixed = searched.manifest["candidates"][0]
    bits = {
        node.name: node.attributes["bits"].as_int()
        for node in load_graph(searched.folder / "model.onnx").graph
        if node.op_type == "MatMulNBits"
    }
    assert {name for name, count in bits.items() if count == 8} == {name for name, _ in mixed["eight_bit"]}
    assert len(bits) == len(mixed["matmuls"])


def test_the_recipe_repeats_the_model_byte_for_byte(searched: CompileResult, planted: Path, texts: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(planted, tmp_path / "elsewhere")
    again = compile_planted(elsewhere, texts, tmp_path / "again", recipe=searched.folder / "recipe.yaml", use_cache=False)
    assert (again.folder / "model.onnx").read_bytes() == (searched.folder / "model.onnx").read_bytes()
    assert [item["name"] for item in again.manifest["candidates"]] == ["four-mixed", "float"]


def test_what_a_search_finds_has_its_graph_for_prompts_and_so_has_its_repetition(
    planted: Path, texts: Path, tmp_path: Path
) -> None:
    both = GPTQ.replace("method: gptq", "method: gptq, rotate: auto, prompt_graph: true")
    searched = compile_planted(planted, texts, tmp_path / "searched", overrides=(both,))
    assert searched.manifest["chosen"] == "four-mixed"
    assert len(searched.manifest["candidates"][0]["eight_bit"]) < LAYERS * 6
    again = compile_planted(planted, texts, tmp_path / "again", recipe=searched.folder / "recipe.yaml", use_cache=False)
    for name in ("model.onnx", "model.onnx.data", "prompt.onnx", "prompt.onnx.data"):
        assert (again.folder / name).read_bytes() == (searched.folder / name).read_bytes()
    in_four_bits = [node for node in load_graph(searched.folder / "model.onnx").graph if node.attributes.get_int("bits", 8) == 4]
    assert in_four_bits
    assert not any(node.op_type == "MatMulNBits" for node in load_graph(searched.folder / "prompt.onnx").graph)


def test_without_a_search_the_rung_is_refused(planted: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="four: loss-over-budget"):
        compile_planted(planted, texts, tmp_path / "out", overrides=(GPTQ, "quantize.fallback=off"))


def test_a_budget_that_leaves_nothing_in_four_bits_is_refused_as_such(planted: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"four-mixed: no-float-set-found .*in 0 trials"):
        compile_planted(planted, texts, tmp_path / "out", max_loss=1e-6, overrides=(GPTQ,))
    assert not (tmp_path / "out").exists()


def test_a_search_that_was_killed_repeats_no_trial_but_that_of_the_best_so_far(
    searched: CompileResult, planted: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    write, lifetime = eight_bits.write_with_eight_bits, 2

    def counted(graph: Path, weights: Mapping[str, np.ndarray], rung: Rung, folder: Path, **options: bool) -> Path:
        if len(tried) == lifetime:
            raise InterruptedError("killed")
        tried.append(len(weights))
        return write(graph, weights, rung, folder, **options)

    monkeypatch.setattr(eight_bits, "write_with_eight_bits", counted)
    overrides = (GPTQ, "accuracy.resamples=500")  # another result of the stage than that in the cache
    with pytest.raises(InterruptedError):
        compile_planted(planted, texts, tmp_path / "out", overrides=overrides)
    before, lifetime = list(tried), 100
    tried.clear()
    again = compile_planted(planted, texts, tmp_path / "out", overrides=overrides)
    assert len(before) == 2
    assert tried[0] == before[-1]  # the best so far, whose graph is gone
    assert not set(tried[1:]) & set(before)
    assert (again.folder / "model.onnx").read_bytes() == (searched.folder / "model.onnx").read_bytes()


@given(st.integers(0, 8), st.integers(0, 8))
def test_what_is_left_to_try_begins_with_the_last_that_held(count: int, known: int) -> None:
    sets = [tuple("abcdefgh"[: 8 - place]) for place in range(count)]
    outcomes = {frozenset(names): place < known - 1 for place, names in enumerate(sets[:known])}  # the last one missed
    left = left_to_try(sets, outcomes.get)
    if known == 0:
        assert left == sets
    elif known > count:
        assert left == sets[-1:]  # all that were tried held
    else:
        assert left == sets[max(0, known - 2) : known - 1]


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 10**6)), min_size=1, max_size=40),
    st.floats(0.005, 0.3),
)
def test_sets_shrink_and_leave_no_more_than_their_share_of_the_budget(values: list[tuple[float, int]], max_loss: float) -> None:
    errors = {str(number): error for number, (error, _) in enumerate(values)}
    sizes = {str(number): size for number, (_, size) in enumerate(values)}
    sets = list(sets_in_order(errors, sizes, max_loss))
    assert sets
    for larger, smaller in itertools.pairwise(sets):
        assert larger[: len(smaller)] == smaller
        assert len(larger) > len(smaller)
    rest = [sum(error for name, error in errors.items() if name not in eight) for eight in sets]
    assert all(left <= BUDGET_SHARES[-1] * np.log1p(max_loss) + 1e-9 for left in rest)
    assert rest[0] <= BUDGET_SHARES[0] * np.log1p(max_loss) + 1e-9


def two_products(folder: Path) -> Path:
    """``x`` [batch, sequence, 64] through two products."""
    random = np.random.default_rng(0)
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ("batch", "sequence", 64))
    model = onnx_ir.Model(onnx_ir.Graph([x], [], nodes=[], name="two", opset_imports={"": 20}), ir_version=10)
    value = x
    for name in ("first", "second"):
        weight = new_initializer(model, f"{name}.weight", random.normal(size=(64, 64)).astype(np.float32))
        node = onnx_ir.node("MatMul", [value, weight], name=name)
        model.graph.append(node)
        value = node.outputs[0]
        value.name = f"{name}_result"
    value.type, value.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape(["batch", "sequence", 64])
    model.graph.outputs.append(value)
    folder.mkdir()
    return save_graph(model, folder)


def test_a_matmul_of_four_bits_gets_eight_from_its_float_weight(tmp_path: Path) -> None:
    graph, folder = two_products(tmp_path / "float"), tmp_path / "made"
    folder.mkdir()
    rung = Rung(name="four", scheme="weight-only", graph="fused", weight_only_bits=4, block_size=32)
    built = build_candidate(rung, graph, CalibrationData((), {}), weights=WeightFormat(), folder=folder)
    exact = float_weights(load_graph(graph), ["second"])
    made = load_graph(write_with_eight_bits(built.path, exact, rung, folder))
    first, second = (next(node for node in made.graph if node.name == name) for name in ("first", "second"))
    assert [node.attributes["bits"].as_int() for node in (first, second)] == [4, 8]
    assert np.abs(read_blocks(second).dequantized(64) - exact["second"]).max() < np.abs(exact["second"]).max() / 200
    assert not any(name.endswith("anew") for name in made.graph.initializers)  # no float weight is left behind

    direct = tmp_path / "direct"
    direct.mkdir()
    named = rung.model_copy(update={"eight_bit_matmuls": ("second",)})
    build_candidate(named, graph, CalibrationData((), {}), weights=WeightFormat(), folder=direct)
    assert (direct / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    rung = Rung(name="four", scheme="weight-only", graph="fused", weight_only_bits=4, eight_bit_matmuls=("third",))
    with pytest.raises(RecipeError, match="no MatMul 'third'"):
        build_candidate(rung, two_products(tmp_path / "float"), CalibrationData((), {}), weights=WeightFormat(), folder=folder)


def test_eight_bits_for_some_need_four_for_the_others() -> None:
    eight = Rung(name="eight", scheme="weight-only", graph="fused", eight_bit_matmuls=("first",))
    assert [field for field, _ in contradictions(eight)] == ["eight_bit_matmuls"]
