"""The residual stream is rotated without changing an answer, and a graph for prompts reads them nearly as the other one does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.artifact.contract import SessionSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.evaluate.cached_decoding import MANY_ROWS_LOGITS, PromptThenSteps, empty_past
from hfaccel.quant.build import build_candidate
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.prompt_graph import round_channels, write_prompt_graph
from hfaccel.quant.weight_only import store_in_blocks
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import copy_graph, graph_bytes, load_graph, new_initializer, operator_counts, save_graph
from hfaccel.rewrites.last_token_logits import all_token_logits
from hfaccel.rewrites.rotate_residual import can_rotate, rotate_residual, rotated
from hfaccel.rewrites.score_at_once import score_at_once, score_in_blocks
from hfaccel.rewrites.untie_head import untie_head
from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME, Decoder
from hfaccel.runtime.generation.decoding import PROMPT_TOKENS
from hfaccel.runtime.session import GraphSession
from hfaccel.stages.exporters import quiet_exporters

WORDS, LAYERS, CHANNELS = 90, 2, 96
CACHE = GenerationSettings(LAYERS, 2, 16, 64, WORDS, (), 0)
OUTLIER = 5
ANYWHERE = WeightFormat(sums_in_16_bits=True)
"""Right on any processor that these tests may run on."""
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def make_graph(model_type: str, folder: Path) -> Path:
    """A tiny random decoder as the optimize stage leaves it; one channel of its stream is far larger than the others."""
    import mobius

    torch.manual_seed(0)
    sizes = SIZES if model_type != "gpt2" else {"vocab_size": WORDS, "n_embd": CHANNELS, "n_layer": LAYERS, "n_head": 6}
    config = transformers.AutoConfig.for_model(model_type, **sizes, bos_token_id=None, eos_token_id=None)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
        module.get_input_embeddings().weight[:, OUTLIER] *= 40
    module.save_pretrained(folder)
    with quiet_exporters():
        model = mobius.build(str(folder), task="text-generation", dtype="f32", execution_provider="cpu")["model"]
    untie_head(model)
    drop_unused(model)
    return save_graph(model, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_graph("llama", tmp_path_factory.mktemp("llama"))


def logits_of(graph: Path) -> np.ndarray:
    ids = np.random.default_rng(0).integers(1, WORDS, (2, 17))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(2, CACHE)}
    return GraphSession(graph).run(feeds)["logits"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_rotation_changes_no_answer(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    graph = make_graph(model_type, tmp_path / "before")
    model = load_graph(graph)
    readers = rotate_residual(model)
    assert len(readers) >= 2 * LAYERS + 1  # attention, feed-forward, head
    before = logits_of(graph)
    np.testing.assert_allclose(logits_of(save_graph(model, tmp_path / "after")), before, atol=2e-5 * np.abs(before).max())


def test_rotation_evens_out_what_products_read(llama: Path, tmp_path: Path) -> None:
    def spread(model: onnx_ir.Model, folder: Path) -> float:
        """Of the values that feed-forward blocks read: the largest over the root mean square."""
        folder.mkdir()
        block = next(node for node in model.graph if "gate_proj" in (node.name or ""))
        read = block.inputs[0]
        assert read is not None
        model.graph.outputs.append(read)
        ids = np.arange(1, 30)[None]
        values = GraphSession(save_graph(model, folder)).run(
            {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(1, CACHE)}
        )[read.name or ""]
        return float(np.abs(values).max() / np.sqrt(np.square(values).mean()))

    turned = load_graph(llama)
    rotate_residual(turned)
    before, after = spread(load_graph(llama), tmp_path / "before"), spread(turned, tmp_path / "after")
    assert before > 8
    assert after < 5


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_a_stream_of_another_form_is_left_alone(model_type: str, tmp_path: Path) -> None:
    """GPT-2's norms subtract the mean; Gemma 2 adds what a norm gives to the stream."""
    graph = make_graph(model_type, tmp_path)
    model = load_graph(graph)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert not can_rotate(model)
    assert rotate_residual(model) == ()
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


@given(st.integers(1, 200), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_rotation_keeps_lengths_and_angles_of_any_width(width: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(3, width)).astype(np.float32)
    np.testing.assert_allclose(rotated(vectors) @ rotated(vectors).T, vectors @ vectors.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [64, 96, 576])
def test_one_channel_is_spread_over_all(width: int) -> None:
    lone = np.zeros((1, width), dtype=np.float32)
    lone[0, 3] = 1.0
    # An odd factor of 3 or 9 leaves entries up to 1.42 times the even share.
    assert np.abs(rotated(lone)).max() <= 1.42 / np.sqrt(width)


@given(st.integers(1, 150), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_rounding_by_channel_is_within_half_a_step(inputs: int, outputs: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)
    stored = round_channels(weight, 64, WeightFormat())
    assert (stored.scales == stored.scales[:, :1]).all()
    assert (np.abs(stored.dequantized(inputs) - weight) <= stored.scales[:, 0] * 0.501).all()


def calibration() -> CalibrationData:
    ids = np.random.default_rng(3).integers(1, WORDS, (8, 40))
    return CalibrationData([{"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(len(ids), CACHE)}], {})


@pytest.fixture(scope="module", params=["rtn", "gptq"])
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    made = tmp_path_factory.mktemp("with-prompt-graph")
    rung = Rung(
        name="int8-prompt",
        scheme="weight-only",
        graph="fused",
        block_size=64,
        method=request.param,
        eight_bit=("head", "down"),
        rotate=True,
        prompt_graph=True,
    )
    assert contradictions(rung) == ()
    built = build_candidate(rung, llama, calibration(), weights=ANYWHERE, folder=made)
    assert built.path.with_name(PROMPT_GRAPH_NAME).is_file()
    return made


def test_what_reads_a_norm_lies_in_one_file_for_both_graphs_and_the_rest_is_turned(folder: Path) -> None:
    data = (folder / "model.onnx.data").stat().st_size
    assert graph_bytes(folder) == sum(path.stat().st_size for path in folder.iterdir())
    assert (folder / PROMPT_GRAPH_NAME).stat().st_size < data / 2
    turned_bytes = LAYERS * (CHANNELS * CHANNELS + 160 * CHANNELS)  # what attention and the feed-forward block give back
    assert turned_bytes <= (folder / f"{PROMPT_GRAPH_NAME}.data").stat().st_size < 1.1 * turned_bytes
    operators = [node.op_type for node in load_graph(folder / PROMPT_GRAPH_NAME).graph]
    # Query, key, value, the first of the feed-forward block and the head read norms; the others are turned.
    assert operators.count("MatMulNBits") == 0
    assert operators.count("MatMul") == 2 * LAYERS  # with the Hadamard matrix
    assert operators.count("MatMulIntegerToFloat") >= 4 * LAYERS


def planted_massive(folder: Path) -> Path:
    """A Llama with a channel of one feed-forward block that is hundreds of times as large as the others."""
    model = load_graph(make_graph("llama", folder))
    for part in ("gate_proj", "up_proj"):
        node = next(node for node in model.graph if part in (node.name or ""))
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        planted = weight.const_value.numpy().copy()
        planted[:, 7] *= 60
        weight.const_value = onnx_ir.tensor(planted)
    (folder / "planted").mkdir()
    return save_graph(model, folder / "planted")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_massive_channels_stay_in_float_in_the_graph_that_reads_first_tokens(method: str, tmp_path: Path) -> None:
    """A channel of a feed-forward block is planted that is hundreds of times as large as the others."""
    source = planted_massive(tmp_path)
    ids = np.random.default_rng(9).integers(1, WORDS, 40).tolist()
    exact = Decoder(source, SessionSettings(), CACHE).prefill([ids]).logits
    errors = []
    for ratio in (0, 20):
        folder = tmp_path / f"ratio-{ratio}"
        folder.mkdir()
        rung = Rung(
            name="any",
            scheme="weight-only",
            graph="fused",
            block_size=64,
            method=method,  # type: ignore[arg-type]
            rotate=True,
            prompt_graph=True,
            massive_channels=ratio,
        )
        built = build_candidate(rung, source, calibration(), weights=ANYWHERE, folder=folder)
        steps, prompts = (operator_counts(load_graph(folder / name)) for name in ("model.onnx", PROMPT_GRAPH_NAME))
        # One small product, beside those with the Hadamard matrix; single steps would pay for it and gain nothing.
        assert prompts["MatMul"] == 2 * LAYERS + (1 if ratio else 0)
        assert "MatMul" not in steps
        assert built.split_neurons == ()
        errors.append(np.abs(Decoder(built.path, SessionSettings(), CACHE).prefill([ids]).logits - exact).max())
    assert errors[1] < errors[0] / 2


def test_single_steps_have_attention_in_blocks_and_prompts_at_once(llama: Path, tmp_path: Path) -> None:
    model = load_graph(llama)
    assert score_at_once(model) == LAYERS
    (tmp_path / "at-once").mkdir()
    source = save_graph(model, tmp_path / "at-once")
    (tmp_path / "made").mkdir()
    rung = Rung(name="any", scheme="weight-only", graph="fused", block_size=64, rotate=True, prompt_graph=True)
    built = build_candidate(rung, source, calibration(), weights=ANYWHERE, folder=tmp_path / "made")
    steps, prompts = load_graph(built.path), load_graph(built.path.with_name(PROMPT_GRAPH_NAME))
    assert score_in_blocks(steps) == 0
    assert score_at_once(steps) == LAYERS
    assert score_at_once(prompts) == 0
    assert score_in_blocks(prompts) == LAYERS
    ids = np.random.default_rng(4).integers(1, WORDS, 40).tolist()
    there, back = (Decoder(path, SessionSettings(), CACHE).prefill([ids]).logits for path in (source, llama))
    np.testing.assert_allclose(there, back, atol=1e-4)


def test_what_only_prompts_read_is_copied_along(folder: Path, tmp_path: Path) -> None:
    copy_graph(folder / "model.onnx", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("model_type", "heads"), [("gpt2", 6), ("gemma2", 2)])
def test_a_stream_that_cannot_be_rotated_has_a_graph_for_prompts_too(model_type: str, heads: int, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    graph = make_graph(model_type, tmp_path)
    rung = Rung(name="any", scheme="weight-only", graph="fused", block_size=32, rotate="auto", prompt_graph=True)
    built = build_candidate(rung, graph, calibration(), weights=ANYWHERE, folder=tmp_path / "made")
    settings = replace(CACHE, key_value_heads=heads, context_length=1024)
    prompt = np.random.default_rng(1).integers(1, WORDS, 3 * PROMPT_TOKENS).tolist()
    ours, exact = (Decoder(path, SessionSettings(), settings).prefill([prompt]) for path in (built.path, graph))
    assert np.corrcoef(ours.logits[0], exact.logits[0])[0, 1] > 0.99
    left = [node for node in load_graph(tmp_path / "made" / PROMPT_GRAPH_NAME).graph if node.op_type == "MatMulNBits"]
    assert [node.attributes.get_int("N", 0) for node in left] == [WORDS]  # the head


def test_steps_of_many_rows_run_on_the_graph_for_prompts(folder: Path, llama: Path) -> None:
    prompts = [np.random.default_rng(row).integers(1, WORDS, 5 + row).tolist() for row in range(4)]
    exact = Decoder(llama, SessionSettings(), CACHE).prefill(prompts, room=4)
    decoder = Decoder(folder / "model.onnx", SessionSettings(), CACHE)
    never, many = (decoder.under(replace(CACHE, prompt_graph_rows=rows)).prefill(prompts, room=4) for rows in (None, 3))
    np.testing.assert_array_equal(never.logits, many.logits)
    for token in (7, 11):
        said = [way.step(np.full(4, token)) for way in (never, many, exact)]
        assert not np.array_equal(said[0], said[1])  # another graph
        for row in range(4):
            assert np.corrcoef(said[1][row], said[2][row])[0, 1] > 0.995
    for way in (never, many, exact):
        way.keep_rows([1, 3])  # too few now
    first = many.step(np.full(2, 13))
    assert np.corrcoef(first[0], exact.step(np.full(2, 13))[0])[0, 1] > 0.995


def test_prompts_are_read_by_their_graph_and_steps_go_on_from_there(folder: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "alone" / name).write_bytes((folder / name).read_bytes())
    both, alone, exact = (
        Decoder(path, SessionSettings(), CACHE) for path in (folder / "model.onnx", tmp_path / "alone" / "model.onnx", llama)
    )
    prompt = np.random.default_rng(1).integers(1, WORDS, 3 * PROMPT_TOKENS).tolist()
    rows = [prompt, prompt[:5]]
    ways = [decoder.prefill(rows, room=4) for decoder in (both, alone, exact)]
    assert not np.array_equal(ways[0].logits, ways[1].logits)  # it is another graph
    for token in (7, 11, 13):
        said = [way.logits for way in ways]
        for row in range(len(rows)):
            assert np.corrcoef(said[0][row], said[2][row])[0, 1] > 0.995
        ways = [way for way in ways if way.step(np.array([token, token])) is not None]
    short = [decoder.prefill([prompt[: PROMPT_TOKENS - 1]]).logits for decoder in (both, alone)]
    np.testing.assert_array_equal(*short)  # too short to be worth it


def test_no_product_of_the_graph_for_prompts_saturates(tmp_path: Path) -> None:
    """The largest weights meet the largest activations: pairs of products of u8 x s8 are then more than 16 bits hold."""
    tokens, inputs, outputs = 3, 128, 32
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="one"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["tokens", inputs])
    exact = np.where(np.arange(outputs) % 2, 1.0, -1.0) * np.ones((inputs, 1))
    weight = new_initializer(model, "weight", exact.astype(np.float32))
    product = onnx_ir.node("MatMul", [value, weight], name="product")
    result = onnx_ir.node("Neg", product.outputs, outputs=[onnx_ir.val("y", onnx_ir.DataType.FLOAT, ["tokens", outputs])])
    model.graph.extend([product, result])
    model.graph.inputs.append(value)
    model.graph.outputs.extend(result.outputs)
    store_in_blocks(
        Rung(name="eight", scheme="weight-only", graph="fused"),
        model,
        ["product"],
        lambda *_: round_channels(exact, 64, ANYWHERE),
    )
    save_graph(model, tmp_path)
    path = write_prompt_graph(tmp_path / "model.onnx", ["product"], [], ANYWHERE)
    activation = np.full((tokens, inputs), 3.0, dtype=np.float32)
    rounded = round_channels(exact, 64, ANYWHERE).dequantized(inputs)
    np.testing.assert_allclose(rounded, exact, rtol=1e-2)
    np.testing.assert_allclose(GraphSession(path).run({"x": activation})["y"], -activation @ rounded, rtol=1e-3)


def test_a_text_that_is_read_half_by_half_is_read_as_a_whole(llama: Path) -> None:
    ids = np.random.default_rng(4).integers(1, WORDS, (1, 17))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(17)[None]}
    graph = GraphSession(llama, content=with_all_logits(llama))
    whole = graph.run({**feeds, **empty_past(1, CACHE)})["logits"]
    assert whole.shape == (1, 17, WORDS)
    first = {name: value[:, :1] for name, value in feeds.items()}  # one token has no second half
    for read in PromptThenSteps(graph, graph, CACHE).run(feeds), PromptThenSteps(graph, graph, CACHE).run(first):
        assert set(read) == {"logits", MANY_ROWS_LOGITS}
        for logits in read.values():
            np.testing.assert_allclose(logits, whole[:, : logits.shape[1]], atol=1e-4)


class Reading:
    """A graph that remembers how many tokens it was given at a time."""

    def __init__(self, graph: GraphSession) -> None:
        self.input_names = graph.input_names
        self.tokens: list[int] = []
        self._graph = graph

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.tokens.append(feeds["input_ids"].shape[1])
        return self._graph.run(feeds)


def test_steps_that_are_coarser_than_prompts_read_most_of_a_text(llama: Path) -> None:
    ids = np.random.default_rng(4).integers(1, WORDS, (1, 40))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(40)[None]}
    for coarser, length in ((False, 20), (True, 5)):
        prompts, steps = (Reading(GraphSession(llama, content=with_all_logits(llama))) for _ in range(2))
        read = PromptThenSteps(prompts, steps, CACHE, steps_are_coarser=coarser).run(feeds)
        assert prompts.tokens == [length, 40 - length]  # the second time as it reads steps of many rows
        assert steps.tokens == [40 - length]
        assert read["logits"].shape == (1, 40, WORDS)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_beside_steps_in_four_bits_prompts_have_eight_of_their_own(method: str, tmp_path: Path) -> None:
    graph = planted_massive(tmp_path)
    exact = Decoder(graph, SessionSettings(), CACHE)
    rung = Rung(
        name="any",
        scheme="weight-only",
        graph="fused",
        weight_only_bits=4,
        block_size=32,
        symmetric=False,
        method=method,  # type: ignore[arg-type]
        eight_bit=("head",),
        rotate="auto",
        prompt_graph=True,
        massive_channels=20,
    )
    assert contradictions(rung) == ()
    (tmp_path / "made").mkdir()
    built = build_candidate(rung, graph, calibration(), weights=ANYWHERE, folder=tmp_path / "made")
    steps, prompts = load_graph(built.path), load_graph(built.path.with_name(PROMPT_GRAPH_NAME))
    in_eight_bits = [node.name or "" for node in steps.graph if node.attributes.get_int("bits", 0) == 8]
    # The head, and the one product that massive channels reach.
    assert [("lm_head" in name, "down_proj" in name) for name in in_eight_bits] == [(False, True), (True, False)]
    assert sum(node.attributes.get_int("bits", 0) == 4 for node in steps.graph) == 5 * LAYERS - 1
    counts = operator_counts(prompts)
    assert "MatMulNBits" not in counts
    assert counts["MatMulIntegerToFloat"] == 5 * LAYERS + 1
    # The head's weights lie in one file for both; what is in four bits there lies in eight here.
    own = built.path.with_name(f"{PROMPT_GRAPH_NAME}.data").stat().st_size
    matrices = LAYERS * CHANNELS * (CHANNELS + 2 * 32 + CHANNELS + 3 * 160)
    assert matrices <= own < 1.1 * matrices
    ids = np.random.default_rng(9).integers(1, WORDS, 40).tolist()
    decoder, wanted = Decoder(built.path, SessionSettings(), CACHE), exact.prefill([ids], room=2)
    found = decoder.prefill([ids], room=2)
    error = np.abs(found.logits - wanted.logits).max() / np.abs(wanted.logits).max()
    token = np.array([7])
    after = np.abs(found.step(token) - wanted.step(token)).max() / np.abs(wanted.logits).max()
    assert error < 0.01
    assert after < 0.05


def with_all_logits(graph: Path) -> bytes:
    model = load_graph(graph)
    all_token_logits(model)
    content: bytes = onnx_ir.to_proto(model).SerializeToString()
    return content
