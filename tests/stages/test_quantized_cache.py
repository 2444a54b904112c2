"""Keys and values of the cache in 8 or 4 bit: what is said stays close to the float cache, in less memory, in every way of decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import transformers
from typer.testing import CliRunner

import hfaccel
from hfaccel.artifact.contract import SessionSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.cli.app import app
from hfaccel.errors import HfaccelError, IntegrityError
from hfaccel.evaluate.cached_decoding import POSITION_IDS, empty_past
from hfaccel.pipeline import CompileResult
from hfaccel.quant.build import build_candidate
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.quantize_cache import cache_scales, quantize_cache, why_no_quantized_cache
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import copy_graph, load_graph, save_graph
from hfaccel.rewrites.untie_head import untie_head
from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME, Decoder
from hfaccel.runtime.generation.decoding import PROMPT_TOKENS
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings
from hfaccel.runtime.session import GraphSession
from hfaccel.stages.exporters import quiet_exporters

OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed."""
WORDS, LAYERS, HEADS, HEAD_SIZE, CONTEXT, WINDOW = 90, 2, 2, 16, 128, 8
CACHE = GenerationSettings(LAYERS, HEADS, HEAD_SIZE, CONTEXT, WORDS, (), 0)
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "head_dim": HEAD_SIZE,
    "num_key_value_heads": HEADS,
    "intermediate_size": 160,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": WORDS, "n_embd": HEADS * HEAD_SIZE, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
DIFFERENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": GPT2,  # no rotation
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
    "qwen3": {},
}
LEAST_LIKENESS = {8: 0.999, 4: 0.85}
END = 1
OUTLIER = 3
"""A channel of every key that is far larger than the others."""


def make_graph(model_type: str, folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = DIFFERENT[model_type] if model_type == "gpt2" else {**SIZES, **DIFFERENT[model_type]}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            if name.endswith("k_proj.weight"):
                parameter.view(HEADS, HEAD_SIZE, -1)[:, OUTLIER] *= 8
            if name.endswith("q_proj.weight"):  # else attention sees one token alone
                parameter.view(-1, HEAD_SIZE, parameter.shape[-1])[:, [OUTLIER, OUTLIER + HEAD_SIZE // 2]] /= 8
    module.save_pretrained(folder)
    with quiet_exporters():
        model = mobius_graph(folder)
    untie_head(model)
    drop_unused(model)
    return save_graph(model, folder)


def mobius_graph(folder: Path) -> onnx_ir.Model:
    import mobius

    model: onnx_ir.Model = mobius.build(str(folder), task="text-generation", dtype="f32", execution_provider="cpu")["model"]
    return model


def feeds_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), POSITION_IDS: positions, **empty_past(len(ids), CACHE)}


def calibration(seed: int = 5) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [feeds_of(random.integers(1, WORDS, (4, 24))) for _ in range(3)]


def prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(1, WORDS, length).tolist() for length in lengths]


def open_decoder(graph: Path) -> Decoder:
    return Decoder(graph, SessionSettings(intra_op_num_threads=1), CACHE)


def quantized(graph: Path, folder: Path, bits: Any) -> Path:
    folder.mkdir()
    copy_graph(graph, folder)
    quantize_cache(folder / "model.onnx", graph, calibration(), bits)
    return folder / "model.onnx"


def likeness(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The smallest correlation of a row of logits with the one it should be."""
    return min(float(np.corrcoef(one, other)[0, 1]) for one, other in zip(ours, theirs, strict=True))


Way = dict[int, Path]


@pytest.fixture(scope="module", params=DIFFERENT)
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """By bits of the cache: an architecture's graph."""
    folder = tmp_path_factory.mktemp(request.param)
    graph = make_graph(request.param, folder)
    return {32: graph, **{bits: quantized(graph, folder / f"cache{bits}", bits) for bits in (8, 4)}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Way:
    folder = tmp_path_factory.mktemp("llama-alone")
    graph = make_graph("llama", folder)
    return {32: graph, **{bits: quantized(graph, folder / f"cache{bits}", bits) for bits in (8, 4)}}


@pytest.mark.parametrize("bits", [8, 4])
def test_a_ragged_batch_says_nearly_what_it_says_with_a_float_cache(graphs: Way, bits: int) -> None:
    rows = prompts(21, 34, 13)
    exact, ours = (open_decoder(graphs[which]).prefill(rows, room=4) for which in (32, bits))
    for token in (7, 11, 13, 17):
        assert not np.array_equal(ours.logits, exact.logits), "the cache was not quantized"
        assert likeness(ours.logits, exact.logits) > LEAST_LIKENESS[bits]
        for way in (exact, ours):
            way.step(np.full(3, token))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_says_the_same_alone_and_in_a_batch_and_step_by_step(graphs: Way, bits: int) -> None:
    decoder, rows = open_decoder(graphs[bits]), prompts(21, 34, 13)
    together = decoder.prefill(rows, room=2)
    together.step(np.array([5, 6, 7]))
    for number, row in enumerate(rows):
        alone = decoder.prefill([[*row, 5 + number]])
        slowly = decoder.prefill([row[:1]])
        for token in [*row[1:], 5 + number]:
            slowly.step(np.array([token]))
        for other in (alone, slowly):  # a rounding may fall on the other side where sums are made in another order
            assert likeness(together.logits[number : number + 1], other.logits) > 0.9999


@pytest.mark.parametrize("bits", [8, 4])
def test_a_prompt_that_goes_on_reuses_the_integers(llama: Way, bits: int) -> None:
    decoder, (row,) = open_decoder(llama[bits]), prompts(100)
    kept = decoder.prefill([row[:60]])
    decoder.keep(kept)
    going_on = decoder.prefill([row])  # more than the cache has room for: it is copied into a larger one
    assert going_on.reused == 60
    assert likeness(going_on.logits, open_decoder(llama[bits]).prefill([row]).logits) > 0.9999


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_change_places_and_go(llama: Way, bits: int) -> None:
    decoder, rows = open_decoder(llama[bits]), prompts(9, 14, 11)
    way = decoder.prefill(rows, room=4)
    way.reorder([2, 2, 0, 1])  # as beams do
    way.keep_rows([1, 3])
    way.step(np.array([3, 4]))
    fresh = decoder.prefill([[*rows[2], 3], [*rows[1], 4]])
    assert likeness(way.logits, fresh.logits) > 0.9999


def test_buffers_take_a_quarter_and_an_eighth(llama: Way) -> None:
    sizes = {bits: open_decoder(graph).prefill(prompts(70, 3)).cache.bytes for bits, graph in llama.items()}
    assert sizes[32] == 2 * LAYERS * 2 * HEADS * 128 * HEAD_SIZE * 4  # rows, layers, keys and values; 70 tokens in blocks of 64
    assert sizes[8] * 4 == sizes[4] * 8 == sizes[32]


def test_a_channel_of_each_head_has_its_own_scale(llama: Way) -> None:
    """One scale for the tensor would be that of the outlier, and leave little of the others."""
    scales = cache_scales(llama[32], calibration(), 8)["present.0.key"]
    assert scales.shape == (1, HEADS, 1, HEAD_SIZE)
    assert scales[0, :, 0, OUTLIER].min() > 3 * np.median(scales)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_short_calibration_texts_do_for_late_positions(model_type: str, tmp_path: Path) -> None:
    """A key is rotated on with its position: what was small in one channel is large there later."""
    graph = make_graph(model_type, tmp_path)
    token = 7
    scales = cache_scales(graph, [feeds_of(np.full((1, 2), token))], 8)["present.0.key"]
    # Of the first layer of a model with rotated positions a key depends on its token and its position alone.
    later = GraphSession(graph).run(feeds_of(np.full((1, CONTEXT), token)))["present.0.key"]
    inside = bool((np.abs(later) <= scales * 127 * (1 + 1e-5)).all())
    assert inside == (model_type == "llama")  # GPT-2's depend on learned positions, of which two were seen
    if model_type == "llama":  # and the range is not so wide that 8 bits go to waste
        assert np.median(np.abs(later).max(axis=2) / (scales[:, :, 0] * 127)) > 0.7


def test_it_goes_with_a_graph_for_prompts(llama: Way, tmp_path: Path) -> None:
    rung = Rung(
        name="all", scheme="weight-only", graph="fused", block_size=64, rotate=True, prompt_graph=True, cache_bits=8
    )  # fmt: skip
    built = build_candidate(
        rung, llama[32], CalibrationData(calibration(), {}), weights=WeightFormat(sums_in_16_bits=True), folder=tmp_path
    )
    assert built.path.with_name(PROMPT_GRAPH_NAME).is_file()
    rows, decoder = prompts(3 * PROMPT_TOKENS, PROMPT_TOKENS), open_decoder(built.path)
    ours, exact = (way.prefill(rows, room=2) for way in (decoder, open_decoder(llama[32])))
    for token in (7, 11):
        assert likeness(ours.logits, exact.logits) > 0.99
        for way in (ours, exact):
            way.step(np.full(2, token))
    assert ours.cache.bytes * 4 == exact.cache.bytes
    # Both graphs go on with what the other has stored, in a cache that was enlarged.
    alone = decoder.prefill([rows[0]], room=1)
    alone.step(np.array([7]))
    decoder.keep(alone)
    going_on = [*rows[0], 7, *rows[1], *rows[0]]
    again = decoder.prefill([going_on])
    assert again.reused == len(rows[0]) + 1
    assert likeness(again.logits, open_decoder(llama[32]).prefill([going_on]).logits) > 0.99


@pytest.mark.parametrize("bits", [8, 4])
def test_it_goes_with_weights_of_4_bits_by_gptq(llama: Way, tmp_path: Path, bits: Any) -> None:
    rung = Rung(
        name="small", scheme="weight-only", graph="fused", weight_only_bits=4, block_size=32, symmetric=False, method="gptq", cache_bits=bits
    )  # fmt: skip
    built = build_candidate(rung, llama[32], CalibrationData(calibration(), {}), weights=WeightFormat(), folder=tmp_path)
    ours, exact = (open_decoder(graph).prefill(prompts(30)) for graph in (built.path, llama[32]))
    assert likeness(ours.logits, exact.logits) > 0.8
    assert ours.cache.bytes * (32 // bits) == exact.cache.bytes


def test_layers_that_store_in_two_ways_are_refused(llama: Way, tmp_path: Path) -> None:
    model = load_graph(llama[32])
    for value in model.graph.inputs:
        if value.name == "past_key_values.0.value":
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    past = node.inputs[4]
    assert past is not None
    wide = onnx_ir.node("Cast", [past], attributes={"to": onnx_ir.DataType.FLOAT}, name="wide")
    model.graph.insert_before(node, wide)
    node.replace_input_with(4, wide.outputs[0])
    assert why_no_quantized_cache(model) == (
        "past_key_values.0.value is not read by GroupQueryAttention alone, which is what can store integers"
    )
    with pytest.raises(
        IntegrityError, match=r"a cache of a kind that this version does not know: tensor\(float\), tensor\(float16\)"
    ):
        open_decoder(save_graph(model, tmp_path))


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"scheme": "none"}, "a rung of scheme none quantizes nothing"),
        ({"scheme": "weight-only", "engine": "openvino"}, "only onnxruntime stores keys and values in integers, openvino cannot"),
    ],
)
def test_contradictions(fields: dict[str, Any], wrong: str) -> None:
    assert ("cache_bits", wrong) in contradictions(Rung(name="odd", graph="fused", cache_bits=8, **fields))


def test_a_recipe_with_other_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HfaccelError, match="cache_bits: 5 is not one of 4, 8"):
        hfaccel.compile(tmp_path, output=tmp_path / "out", overrides=[f"quantize.ladder={LADDER.replace('8}', '5}')}"])


LADDER = "[{name: cached, scheme: weight-only, graph: fused, block_size: 32, cache_bits: 8}]"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = (" ".join(f"word{number}" for number in random.integers(0, WORDS - 8, 30)) for _ in range(8))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def compiled(checkpoint: Path, output: Path, data: Path, task: str, bits: int = 8, **options: Any) -> CompileResult:
    overrides = [f"quantize.ladder={LADDER.replace('8}', f'{bits}}}')}", "accuracy.max_loss=0.9", "accuracy.batch_invariance=0.9"]
    return hfaccel.compile(
        checkpoint, output=output, task=task, data=data, target=OFF_TARGET, overrides=overrides, use_cache=False, **options
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_graph("llama", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": END, "bos_token_id": 2}), encoding="utf-8")
    write_tokenizer(folder, words=WORDS, settings={"model_max_length": CONTEXT})
    return folder


@pytest.fixture(scope="module")
def artifacts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, texts: Path) -> dict[int, CompileResult]:
    """By bits of the cache."""
    folder = tmp_path_factory.mktemp("compiled")
    return {bits: compiled(checkpoint, folder / str(bits), texts, "text-generation", bits, precision="int8") for bits in (8, 4)}


def open_model(folder: Path) -> GenerationModel:
    model = hfaccel.load(folder)
    assert isinstance(model, GenerationModel)
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_the_artifact_says_how_it_stores_keys_and_values(artifacts: dict[int, CompileResult], bits: int) -> None:
    result = artifacts[bits]
    assert result.manifest["chosen"] == "cached"
    words = f"{bits} bits, {2 * LAYERS * HEADS * HEAD_SIZE * bits // 8} bytes a token"
    assert f"It is stored in {words}." in (result.folder / "README.md").read_text(encoding="utf-8")
    assert f"keys and values of the cache in {bits} bits" in (result.folder / "report.md").read_text(encoding="utf-8")
    specs = {spec["name"]: spec for kind in ("inputs", "outputs") for spec in result.manifest["contract"][kind]}
    for name in ("past_key_values.1.value", "present.0.key"):
        stored = ("int8", HEAD_SIZE) if bits == 8 else ("uint8", HEAD_SIZE // 2)
        assert (specs[name]["dtype"], specs[name]["shape"][-1]) == stored
    assert words in CliRunner().invoke(app, ["inspect", str(result.folder)], env={"COLUMNS": "200"}).output


def test_the_gate_judges_the_graph_with_its_cache(artifacts: dict[int, CompileResult]) -> None:
    """Nothing else differs between the two, so with a float cache the verdicts would be the same."""
    found = {
        bits: next(item["verdict"]["cosine_mean"] for item in result.manifest["candidates"] if item["name"] == "cached")
        for bits, result in artifacts.items()
    }
    assert 0.5 < found[4] < found[8] < 1


@pytest.mark.parametrize("bits", [8, 4])
def test_the_artifact_answers_in_every_way(artifacts: dict[int, CompileResult], bits: int) -> None:
    folder = artifacts[bits].folder
    model, asked = open_model(folder), ["word3 word9 word40", "word7 word8 word9 word10 word11 word60 word2"]
    together = model.generate(asked, max_new_tokens=12)
    assert [model.generate(text, max_new_tokens=12) for text in asked] == together
    assert "".join(model.generate(asked[1], max_new_tokens=12, stream=True)) == together[1]
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_onnxruntime_genai_opens_it_and_answers_alike(artifacts: dict[int, CompileResult], bits: int) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    folder, (prompt,) = artifacts[bits].folder, prompts(12)
    expected = open_model(folder).generate_ids([prompt], SamplingSettings(max_new_tokens=24))[0]
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 24, batch_size=1)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answer = generator.get_sequence(0)[len(prompt) :].tolist()
    assert [token for token in answer if token != END] == [token for token in expected if token != END]
    assert len(set(answer)) > 3, "the model repeats itself: nothing would be compared"


def test_an_encoder_has_no_cache(make_architecture: Callable[[str], Path], tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("word1 word2 word3\n" * 8, encoding="utf-8")
    result = compiled(make_architecture("bert"), tmp_path / "out", data, "text-classification")
    found = next(item for item in result.manifest["candidates"] if item["name"] == "cached")
    assert (found["reason"], found["detail"]) == (
        "not-supported-by-model",
        "the model writes no text and keeps no keys and values",
    )
