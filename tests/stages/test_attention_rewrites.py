"""Rewrites of exported attention: fewer operators, the same numbers, and nothing touched that only looks like the pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.rewrites.drop_empty_row_guard import drop_empty_row_guard
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.fold_attention_scale import fold_attention_scale
from hfaccel.rewrites.graphs import load_graph, new_initializer, operator_counts, save_graph
from hfaccel.rewrites.merge_transposes import merge_transposes
from hfaccel.rewrites.pack_projections import PACKED_SUFFIX, pack_projections
from hfaccel.runtime.session import GraphSession

HIDDEN, HEADS, WINDOW = 32, 4, 3
FLOAT, INT64 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64


class Attention(torch.nn.Module):
    """Embeddings and one self-attention as transformers write it: padding masked, or with ``window`` what is far away too."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(50, HIDDEN)
        self.query, self.key, self.value = (torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.output = torch.nn.Linear(HIDDEN, HIDDEN)
        self.window = window

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        batch, length = input_ids.shape
        hidden = self.embedding(input_ids)
        query, key, value = (
            part(hidden).view(batch, length, HEADS, HIDDEN // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mask = attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)
        if self.window is not None:
            place = torch.arange(length)
            mask = mask & ((place[:, None] - place[None, :]).abs() <= self.window)
        scale = (HIDDEN // HEADS) ** -0.25
        bias = (~mask).float() * torch.finfo(torch.float32).min
        empty = mask.float().sum(-1, keepdim=True) < 1
        scores = (query * scale) @ (
            key.reshape(-1, length, HIDDEN // HEADS).transpose(1, 2).reshape(batch, HEADS, -1, length) * scale
        )
        mixed = torch.where(empty, torch.tensor(0.0), torch.softmax(scores + bias, -1) @ value)
        result: torch.Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, HIDDEN))
        return result


def export(module: torch.nn.Module, folder: Path) -> Path:
    ids = torch.randint(0, 50, (2, 9))
    shapes = {name: {0: torch.export.Dim("b"), 1: torch.export.Dim("s", max=2048)} for name in ("input_ids", "attention_mask")}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = torch.onnx.export(module.eval(), kwargs=inputs, dynamo=True, dynamic_shapes=shapes)
    assert program is not None
    folder.mkdir(parents=True)
    return save_graph(program.model, folder)


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Attention(None), tmp_path_factory.mktemp("attention") / "graph")


def answers(model: onnx_ir.Model, folder: Path, batch: int, length: int) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(length)
    mask = np.ones((batch, length), dtype=np.int64)
    mask[-1, (length + 1) // 2 :] = 0
    session = GraphSession(save_graph(model, folder))
    feeds = {"input_ids": generator.integers(0, 50, (batch, length)), "attention_mask": mask}
    return session.run(feeds)[session.output_names[0]]


REWRITES = {
    "guard": drop_empty_row_guard,
    "transposes": merge_transposes,
    "scale": fold_attention_scale,
    "pack": pack_projections,
}


@pytest.mark.parametrize("names", [("guard",), ("transposes",), ("scale",), ("pack",), tuple(REWRITES)])
def test_answers_stay_the_same(names: tuple[str, ...], attention: Path, tmp_path: Path) -> None:
    model = load_graph(attention)
    for name in names:
        assert REWRITES[name](model) > 0
        drop_unused(model)
        assert REWRITES[name](model) == 0  # a second time there is nothing left
    for batch, length in ((1, 1), (1, 2), (3, 7), (2, 33)):
        before = answers(load_graph(attention), tmp_path / "before", batch, length)
        after = answers(model, tmp_path / "after", batch, length)
        np.testing.assert_allclose(after, before, atol=2e-6)


def test_attention_is_left_with_what_it_needs(attention: Path) -> None:
    model = load_graph(attention)
    for rewrite in REWRITES.values():
        rewrite(model)
        drop_unused(model)
    counts = operator_counts(model)
    assert "Where" not in counts
    assert counts["Transpose"] == 4  # query, key, value, result
    assert (counts["MatMul"], counts["Split"]) == (4, 1)  # projections, scores, mixture, output
    # one left: it makes the mask
    assert counts["Mul"] == 1


def test_the_guard_of_windowed_attention_stays(tmp_path: Path) -> None:
    model = load_graph(export(Attention(WINDOW), tmp_path / "graph"))
    guards = operator_counts(model)["Where"]
    assert drop_empty_row_guard(model) == 0
    assert operator_counts(model)["Where"] == guards


def layout_graph(shape: list[int | str], steps: list[tuple[str, Any]]) -> onnx_ir.Model:
    """A graph of Reshapes (to a constant shape) and Transposes; a Neg at its end, as rewrites leave graph outputs alone."""
    value = onnx_ir.Value(name="x", shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(FLOAT))
    graph = onnx_ir.Graph([value], [], nodes=[], opset_imports={"": 20}, name="layout")
    for number, (kind, argument) in enumerate(steps):
        if kind == "Transpose":
            node = onnx_ir.node("Transpose", [value], {"perm": argument}, name=f"node{number}")
        else:
            tensor = onnx_ir.tensor(np.array(argument, dtype=np.int64), name=f"shape{number}")
            constant = onnx_ir.Value(
                name=f"shape{number}", const_value=tensor, shape=onnx_ir.Shape([len(argument)]), type=onnx_ir.TensorType(INT64)
            )
            graph.register_initializer(constant)
            node = onnx_ir.node("Reshape", [value, constant], name=f"node{number}")
        node.outputs[0].name, node.outputs[0].type = f"value{number}", onnx_ir.TensorType(FLOAT)
        graph.append(node)
        value = node.outputs[0]
    last = onnx_ir.node("Neg", [value], name="last")
    last.outputs[0].name, last.outputs[0].type = "result", onnx_ir.TensorType(FLOAT)
    graph.append(last)
    graph.outputs.append(last.outputs[0])
    return onnx_ir.Model(graph, ir_version=10)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4)))
def test_two_transposes_become_the_one_that_does_both(first: list[int], second: list[int]) -> None:
    model = layout_graph(["b", 2, "s", 5], [("Transpose", first), ("Transpose", second)])
    assert merge_transposes(model) == 1
    drop_unused(model)
    [transpose] = [node for node in model.graph if node.op_type == "Transpose"]
    axes = transpose.attributes.get_ints("perm")
    numbers = np.arange(3 * 2 * 7 * 5).reshape(3, 2, 7, 5)
    np.testing.assert_array_equal(numbers.transpose(axes), numbers.transpose(first).transpose(second))


def test_a_chain_that_mixes_axes_is_no_transpose() -> None:
    model = layout_graph([6, 4], [("Transpose", [1, 0]), ("Reshape", [6, 4]), ("Transpose", [1, 0])])
    assert merge_transposes(model) == 0


def test_a_projection_with_another_reader_keeps_its_weights(attention: Path, tmp_path: Path) -> None:
    model = load_graph(attention)
    expected = fold_attention_scale(load_graph(attention))
    read = next(node for node in model.graph if node.op_type == "Transpose").outputs[0]
    assert {user.op_type for user, _ in read.uses()} == {"Mul"}
    other = onnx_ir.node("Neg", [read], name="other_reader")
    other.outputs[0].name, other.outputs[0].type = "other", onnx_ir.TensorType(FLOAT)
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    assert fold_attention_scale(model) == expected - 1


def scores_graph(operator: str, *, number_first: bool = False, read_twice: bool = False) -> onnx_ir.Model:
    """Query and key of x [batch, 3, 4], their product, and what scales it by a number."""
    numbers = np.random.default_rng(4)
    x = onnx_ir.val("x", FLOAT, ["batch", 3, 4])
    graph = onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="scores")
    model = onnx_ir.Model(graph, ir_version=10)

    def constant(name: str, *shape: int) -> onnx_ir.Value:
        return new_initializer(model, name, numbers.normal(size=shape).astype(np.float32))

    query = onnx_ir.node("MatMul", [x, constant("Wq", 4, 4)], name="query")
    biased = onnx_ir.node("Add", [query.outputs[0], constant("bq", 4)], name="biased")
    key = onnx_ir.node("MatMul", [x, constant("Wk", 4, 4)], name="key")
    turned = onnx_ir.node("Transpose", key.outputs, {"perm": [0, 2, 1]}, name="turned")
    scores = onnx_ir.node("MatMul", [biased.outputs[0], turned.outputs[0]], name="scores")
    number = new_initializer(model, "number", np.array(8, dtype=np.float32))
    sides = [number, scores.outputs[0]] if number_first else [scores.outputs[0], number]
    scaled = onnx_ir.node(operator, sides, name="scaled")
    last = onnx_ir.node("Add", [scaled.outputs[0], scores.outputs[0]] if read_twice else [scaled.outputs[0], number], name="last")
    graph.extend([query, biased, key, turned, scores, scaled, last])
    last.outputs[0].name, last.outputs[0].type = "result", onnx_ir.TensorType(FLOAT)
    last.outputs[0].shape = onnx_ir.Shape(["batch", 3, 3])
    graph.outputs.append(last.outputs[0])
    return model


@pytest.mark.parametrize(("operator", "number_first"), [("Div", False), ("Mul", False), ("Mul", True)])
def test_the_scale_of_scores_goes_into_the_query(operator: str, number_first: bool, tmp_path: Path) -> None:
    model = scores_graph(operator, number_first=number_first)
    feeds = {"x": np.random.default_rng(5).normal(size=(2, 3, 4)).astype(np.float32)}

    def result(folder: Path) -> np.ndarray:
        folder.mkdir()
        return GraphSession(save_graph(model, folder)).run(feeds)["result"]

    before = result(tmp_path / "before")
    assert fold_attention_scale(model) == 1
    assert operator not in operator_counts(model)
    np.testing.assert_allclose(result(tmp_path / "after"), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [scores_graph("Div", number_first=True), scores_graph("Div", read_twice=True)])
def test_a_number_that_is_divided_and_scores_that_others_read_stay(model: onnx_ir.Model) -> None:
    assert fold_attention_scale(model) == 0


def test_projections_of_different_values_are_not_packed(attention: Path) -> None:
    model = load_graph(attention)
    assert pack_projections(model) == 2
    [packed] = [node for node in model.graph if (node.name or "").endswith(PACKED_SUFFIX)]
    assert packed.inputs[1] is not None
    assert packed.inputs[1].shape == onnx_ir.Shape([HIDDEN, 3 * HIDDEN])
    assert sum(node.op_type == "MatMul" and node is not packed for node in model.graph) == 3
