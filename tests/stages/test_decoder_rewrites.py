"""Rewrites of decoders: the same answers from fewer or larger products; and a parity check that notices a lost cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
import transformers

from hfaccel.artifact.contract import TextSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.evaluate import parity
from hfaccel.evaluate.cached_decoding import CachedDecoding, empty_past
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import load_graph, operator_counts, save_graph
from hfaccel.rewrites.last_token_logits import all_token_logits, last_token_logits
from hfaccel.rewrites.score_at_once import score_at_once
from hfaccel.rewrites.untie_head import untie_head
from hfaccel.runtime.session import GraphSession
from hfaccel.stages.exporters import quiet_exporters

WORDS, LAYERS, HEADS, HEAD_SIZE = 90, 2, 2, 16
CACHE = GenerationSettings(LAYERS, HEADS, HEAD_SIZE, 64, WORDS, (), 0)
TEXT = TextSettings(max_length=64, pad_token_id=0)
SHAPES = ("1x2", "1x9", "2x16", "3x21")
FLOAT = onnx_ir.DataType.FLOAT


class Reference:
    """The torch model behind :class:`hfaccel.runtime.session.Runner`: reads whole texts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.input_names: tuple[str, ...] = ("input_ids", "attention_mask")
        self._model = model

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(feeds[name]) for name in self.input_names}
            return {"logits": self._model(**inputs).logits.numpy()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """The graph of a tiny random Llama with tied embeddings, and the same in torch."""
    import mobius

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        intermediate_size=96,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    module.save_pretrained(folder)
    with quiet_exporters():
        model = mobius.build(str(folder), task="text-generation", dtype="f32", execution_provider="cpu")["model"]
    return save_graph(model, folder), Reference(module)


def run(model: onnx_ir.Model, folder: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    folder.mkdir()
    return GraphSession(save_graph(model, folder)).run(feeds)


def ragged_prompt() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Three rows of different lengths without a past, and the index of the last token of each."""
    lengths = np.array([5, 11, 1])
    ids = np.random.default_rng(3).integers(1, WORDS, (3, 11))
    mask = (np.arange(11) < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, **empty_past(3, CACHE)}, lengths - 1


def pasts(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("present.", "past_key_values."): value for name, value in outputs.items() if name != "logits"}


def with_next(feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], new: int) -> dict[str, np.ndarray]:
    """What to feed after a prompt: ``new`` tokens a row, counted from where the row has ended."""
    ids = np.random.default_rng(4).integers(1, WORDS, (len(feeds["input_ids"]), new))
    mask = np.concatenate([feeds["attention_mask"], np.ones_like(ids)], axis=1)
    return {"input_ids": ids, "attention_mask": mask, **pasts(outputs)}


def test_the_last_token_of_each_row_is_picked(llama: tuple[Path, Reference], tmp_path: Path) -> None:
    feeds, last = ragged_prompt()
    every = run(load_graph(llama[0]), tmp_path / "all", feeds)["logits"]
    model = load_graph(llama[0])
    assert last_token_logits(model) == 1
    assert last_token_logits(model) == 0  # made already
    picked = run(model, tmp_path / "last", feeds)["logits"]
    assert picked.shape == (3, 1, WORDS)
    np.testing.assert_allclose(picked[:, 0], every[np.arange(3), last], atol=1e-5)


@pytest.mark.parametrize("new", [1, 3])
def test_the_last_token_is_picked_after_a_past(new: int, llama: tuple[Path, Reference], tmp_path: Path) -> None:
    lengths = slice(0, 2) if new == 1 else slice(1, 2)  # several new tokens follow rows of one length only
    feeds, _ = ragged_prompt()
    feeds = {name: value[lengths] for name, value in feeds.items()}
    prompt = run(load_graph(llama[0]), tmp_path / "prompt", feeds)
    after = with_next(feeds, prompt, new)
    every = run(load_graph(llama[0]), tmp_path / "all", after)["logits"]
    model = load_graph(llama[0])
    last_token_logits(model)
    np.testing.assert_allclose(run(model, tmp_path / "last", after)["logits"], every[:, -1:], atol=1e-5)


def test_all_token_logits_takes_the_rewrite_back(llama: tuple[Path, Reference], tmp_path: Path) -> None:
    feeds, _ = ragged_prompt()
    before = run(load_graph(llama[0]), tmp_path / "before", feeds)["logits"]
    model = load_graph(llama[0])
    operators = operator_counts(model)
    assert all_token_logits(model) == 0  # nothing to take back
    last_token_logits(model)
    assert all_token_logits(model) == 1
    drop_unused(model)
    assert operator_counts(model) == operators
    np.testing.assert_array_equal(run(model, tmp_path / "after", feeds)["logits"], before)


def test_a_head_behind_a_soft_cap_is_found(tmp_path: Path) -> None:
    model = capped_head()
    feeds = {
        "input_ids": np.array([[4, 2, 0], [5, 1, 3]], dtype=np.int64),
        "attention_mask": np.array([[1, 1, 0], [1, 1, 1]], dtype=np.int64),
    }
    every = run(capped_head(), tmp_path / "all", feeds)["logits"]
    assert last_token_logits(model) == 1
    np.testing.assert_allclose(run(model, tmp_path / "last", feeds)["logits"][:, 0], every[[0, 1], [1, 2]], atol=1e-6)


def test_logits_that_no_product_makes_are_left_alone() -> None:
    model = capped_head(through="Softmax")
    assert last_token_logits(model) == 0


def capped_head(through: str = "Tanh") -> onnx_ir.Model:
    """Embeddings, a tied head and what works on the logits."""
    table = constant("table", np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32))
    cap = constant("cap", np.array(3.0, dtype=np.float32))
    ids, mask = (integers(name) for name in ("input_ids", "attention_mask"))
    hidden = onnx_ir.node("Gather", [table, ids])
    transposed = onnx_ir.node("Transpose", [table], {"perm": [1, 0]})
    product = onnx_ir.node("MatMul", [hidden.outputs[0], transposed.outputs[0]])
    divided = onnx_ir.node("Div", [product.outputs[0], cap])
    squeezed = onnx_ir.node(through, divided.outputs)
    multiplied = onnx_ir.node("Mul", [squeezed.outputs[0], cap])
    logits = multiplied.outputs[0]
    logits.name, logits.type = "logits", onnx_ir.TensorType(FLOAT)
    logits.shape = onnx_ir.Shape(["batch", "sequence", 7])
    nodes = [hidden, transposed, product, divided, squeezed, multiplied]
    return as_model([ids, mask], [logits], nodes, [table, cap])


def integers(name: str) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(onnx_ir.DataType.INT64), shape=onnx_ir.Shape(["batch", "sequence"]))


def constant(name: str, array: np.ndarray) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(array, name=name)
    return onnx_ir.Value(name=name, const_value=tensor, type=onnx_ir.TensorType(FLOAT), shape=onnx_ir.Shape(array.shape))


def as_model(
    inputs: list[onnx_ir.Value], outputs: list[onnx_ir.Value], nodes: list[onnx_ir.Node], constants: list[onnx_ir.Value]
) -> onnx_ir.Model:
    for number, node in enumerate(nodes):
        node.name = node.name or f"node_{number}"
        for value in node.outputs:
            value.name = value.name or f"value_{number}"
    graph = onnx_ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 20}, name="made")
    return onnx_ir.Model(graph, ir_version=10)


def test_a_tied_head_gets_its_own_weight(tmp_path: Path) -> None:
    model = capped_head()
    feeds = {name: np.array([[4, 2], [5, 1]], dtype=np.int64) for name in ("input_ids", "attention_mask")}
    before = run(capped_head(), tmp_path / "before", feeds)["logits"]
    assert untie_head(model) == 1
    assert untie_head(model) == 0
    assert "Transpose" not in operator_counts(model)
    head = next(node for node in model.graph if node.op_type == "MatMul")
    assert head.inputs[1] is not None
    assert head.inputs[1].const_value is not None  # so a quantizer sees it
    np.testing.assert_allclose(run(model, tmp_path / "after", feeds)["logits"], before, atol=1e-6)


def test_a_transposed_table_that_others_read_too_is_left_alone() -> None:
    model = capped_head()
    transpose = next(node for node in model.graph if node.op_type == "Transpose")
    shape = onnx_ir.node("Shape", transpose.outputs, name="shape")
    model.graph.append(shape)
    shape.outputs[0].name = "shape_value"
    assert untie_head(model) == 0
    assert operator_counts(model)["Transpose"] == 1


class Forgetful:
    """Runs a graph as if nothing had come before, like an export whose cache is not wired; masks and shapes stay right."""

    def __init__(self, graph: GraphSession, forgets: str) -> None:
        self.input_names: tuple[str, ...] = graph.input_names
        self._graph, self._forgets = graph, forgets

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        lost = {name: np.zeros_like(value) for name, value in feeds.items() if name.startswith(self._forgets)}
        return self._graph.run({**feeds, **lost})


def recorded(reference: Reference) -> list[parity.ParityCase]:
    return parity.record(reference, parity.make_inputs(SHAPES, TEXT, vocabulary_size=WORDS, seed=0))


def test_a_graph_that_keeps_its_cache_has_parity(llama: tuple[Path, Reference]) -> None:
    found = parity.compare(CachedDecoding(GraphSession(llama[0]), CACHE), recorded(llama[1]))
    assert found.max_abs < 1e-5
    assert found.min_cosine > 0.99999


@pytest.mark.parametrize("forgets", ["past_key_values.", "past_key_values.1.value"])
def test_a_graph_that_forgets_its_cache_has_none(forgets: str, llama: tuple[Path, Reference]) -> None:
    found = parity.compare(CachedDecoding(Forgetful(GraphSession(llama[0]), forgets), CACHE), recorded(llama[1]))
    assert found.max_abs > 1e-2
    assert found.min_cosine < 0.999


def test_scores_written_down_at_once_change_no_answer(llama: tuple[Path, Reference], tmp_path: Path) -> None:
    ids = np.random.default_rng(5).integers(1, WORDS, (2, 33))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(2, CACHE)}
    model = load_graph(llama[0])
    before = GraphSession(llama[0]).run(feeds)
    assert score_at_once(model) == LAYERS
    found = run(model, tmp_path / "out", feeds)
    for name, values in before.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    assert score_at_once(model) == 0


@pytest.mark.parametrize("other", [{"local_window_size": 8}, {"smooth_softmax": 1}])
def test_attention_of_another_kind_keeps_its_blocks(llama: tuple[Path, Reference], other: dict[str, int]) -> None:
    model = load_graph(llama[0])
    first = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    for name, value in other.items():
        first.attributes[name] = onnx_ir.AttrInt64(name, value)
    assert score_at_once(model) == LAYERS - 1
    assert len(first.inputs) < 12
