"""Products with a scale per token: what is turned stays what it was, and no token disturbs another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.channel_weight import ChannelWeight
from hfaccel.quant.per_token import PerTokenProducts, store_per_token, turned, turning_group
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import load_graph, new_initializer, operator_counts, save_graph
from hfaccel.rewrites.rotate_residual import hadamard
from hfaccel.runtime.session import GraphSession

INPUTS, OUTPUTS = 192, 24
ANYWHERE = WeightFormat(sums_in_16_bits=True)
"""Right on any processor that these tests may run on."""


def graph_of(weight: np.ndarray, folder: Path, *, group: int | None, products: int = 1, weights: WeightFormat = ANYWHERE) -> Path:
    """``y0``, ``y1``, ... = x times the weight, as per-token products."""
    folder.mkdir(exist_ok=True)
    inputs, outputs = weight.shape
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="one"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", inputs])
    model.graph.inputs.append(value)
    placeholder = onnx_ir.val("placeholder", onnx_ir.DataType.FLOAT, [inputs, outputs])
    made = PerTokenProducts(model)
    for number in range(products):
        product = onnx_ir.node("MatMul", [value, placeholder], name=f"product{number}")
        product.outputs[0].name = f"y{number}"
        model.graph.append(product)
        model.graph.outputs.append(product.outputs[0])
        stored = ChannelWeight.nearest(weight if group is None else turned(weight, group), weights)
        made.replace(product, *stored.store(model, f"weight{number}"), group)
    for number, output in enumerate(model.graph.outputs):
        output.name, output.type = f"y{number}", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        output.shape = onnx_ir.Shape(["batch", "sequence", outputs])
    return save_graph(model, folder)


@given(st.sampled_from([16, 32, 64]), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_turning_both_sides_changes_no_product(group: int, groups: int, outputs: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(7, group * groups)).astype(np.float32)
    weight = random.normal(size=(group * groups, outputs)).astype(np.float32)
    turning = hadamard(group) / np.sqrt(group)
    np.testing.assert_allclose(turning @ turning, np.eye(group), atol=1e-5)
    turned_tokens = (tokens.reshape(-1, group) @ turning).reshape(tokens.shape)
    np.testing.assert_allclose(turned_tokens @ turned(weight, group), tokens @ weight, atol=1e-3)


@pytest.mark.parametrize(("inputs", "group"), [(576, 64), (1536, 64), (96, 32), (48, 16), (24, None), (90, None), (33, None)])
def test_as_many_channels_are_turned_together_as_divide_them(inputs: int, group: int | None) -> None:
    assert turning_group(inputs) == group


def test_a_channel_and_a_token_that_stand_out_cost_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    # So small that sums of two products fit into 16 bits also where a processor has nothing better.
    weight = random.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    tokens = random.normal(size=(1, 9, INPUTS)).astype(np.float32)
    tokens[..., 17] *= 40  # a channel
    tokens[:, 0] *= 500  # a token, as the first one of a text
    wanted = tokens @ weight

    def error(group: int | None) -> float:
        path = graph_of(weight, tmp_path / str(group), group=group, weights=WeightFormat())
        difference = GraphSession(path).run({"x": tokens})["y0"] - wanted
        return float(np.median(np.square(difference).sum(axis=-1) / np.square(wanted).sum(axis=-1)))

    assert error(64) < 1e-3
    assert error(None) > 4 * error(64)


def test_a_token_is_told_the_same_alone_and_among_others(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    path = graph_of(random.normal(size=(INPUTS, OUTPUTS)).astype(np.float32), tmp_path, group=64)
    graph, tokens = GraphSession(path), random.normal(size=(4, 3, INPUTS)).astype(np.float32)
    tokens[1] *= 1000
    together = graph.run({"x": tokens})["y0"]
    for row in range(4):
        np.testing.assert_allclose(graph.run({"x": tokens[row : row + 1]})["y0"][0], together[row], rtol=1e-5, atol=1e-4)


def test_a_token_of_zeros_gives_zeros(tmp_path: Path) -> None:
    path = graph_of(np.ones((INPUTS, OUTPUTS), dtype=np.float32), tmp_path, group=64)
    assert not GraphSession(path).run({"x": np.zeros((1, 2, INPUTS), dtype=np.float32)})["y0"].any()


def test_tokens_that_several_products_read_are_rounded_once(tmp_path: Path) -> None:
    path = graph_of(np.ones((INPUTS, OUTPUTS), dtype=np.float32), tmp_path, group=64, products=3)
    operators = [node.op_type for node in onnx_ir.load(str(path)).graph]
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("MatMulIntegerToFloat") == 3


def test_a_weight_that_two_products_share_is_stored_once(tmp_path: Path) -> None:
    weight = np.random.default_rng(7).normal(size=(64, 64)).astype(np.float32)
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", 64])
    model = onnx_ir.Model(onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="two"), ir_version=9)
    shared = new_initializer(model, "weight", weight)
    first = onnx_ir.node("MatMul", [x, shared], name="first")
    between = onnx_ir.node("Tanh", first.outputs, name="between")
    second = onnx_ir.node("MatMul", [*between.outputs, shared], name="second")
    for number, node in enumerate((first, between, second)):
        node.outputs[0].name = f"h{number}"
    model.graph.extend([first, between, second])
    model.graph.outputs.extend(second.outputs)
    second.outputs[0].type, second.outputs[0].shape = (
        onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        onnx_ir.Shape(["batch", "sequence", 64]),
    )
    store_per_token(model, ["first", "second"], ANYWHERE)
    assert [name for name in model.graph.initializers if name.startswith("weight")] == ["weight_levels", "weight_scales"]
    tokens = np.random.default_rng(8).normal(size=(1, 5, 64)).astype(np.float32)
    found = GraphSession(save_graph(model, tmp_path)).run({"x": tokens})
    wanted = np.tanh(tokens @ weight) @ weight
    assert np.linalg.norm(next(iter(found.values())) - wanted) < 0.05 * np.linalg.norm(wanted)


def gated_block(folder: Path, *, read_twice: bool) -> Path:
    """``y`` = (tanh(x times a) * (x times b)) times c, all per token and the last one turned; b's product may have another reader."""
    folder.mkdir()
    random = np.random.default_rng(11)
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", 96])
    model = onnx_ir.Model(
        onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="gated"), ir_version=9
    )
    placeholder = onnx_ir.val("placeholder", onnx_ir.DataType.FLOAT, [96, 128])
    gate, up = (onnx_ir.node("MatMul", [x, placeholder], name=name) for name in ("gate", "up"))
    tanh = onnx_ir.node("Tanh", gate.outputs, name="tanh")
    gating = onnx_ir.node("Mul", [tanh.outputs[0], up.outputs[0]], name="gating")
    down = onnx_ir.node("MatMul", [gating.outputs[0], placeholder], name="down")
    model.graph.extend([gate, up, tanh, gating, down])
    outputs = [down.outputs[0], up.outputs[0]] if read_twice else [down.outputs[0]]
    for node in (gate, up, tanh, gating, down):
        node.outputs[0].name = f"{node.name}_value"
    model.graph.outputs.extend(outputs)
    products = PerTokenProducts(model)
    for node, inputs, width, group in ((gate, 96, 128, None), (up, 96, 128, None), (down, 128, 96, 64)):
        weight = random.normal(size=(inputs, width)).astype(np.float32)
        stored = ChannelWeight.nearest(weight if group is None else turned(weight, group), ANYWHERE)
        products.replace(node, *stored.store(model, f"{node.name}_weight"), group)
    for output, width in zip(model.graph.outputs, (96, 128), strict=False):
        output.type, output.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape(["batch", "sequence", width])
    drop_unused(model)
    return save_graph(model, folder)


def test_a_gated_block_scales_its_tokens_once_at_its_end(tmp_path: Path) -> None:
    late, early = (gated_block(tmp_path / str(twice), read_twice=twice) for twice in (False, True))
    counts = [operator_counts(load_graph(path))["Mul"] for path in (late, early)]
    # Scales of gate and down, the gating itself, and the two scales; or the scale of up in place of the last.
    assert counts == [4, 4]
    wide = [node for node in load_graph(late).graph if node.op_type == "Mul" and "up" in (node.name or "")]
    assert not wide
    tokens = np.random.default_rng(12).normal(size=(2, 9, 96)).astype(np.float32)
    tokens[0, 3] *= 1000
    tokens[1, 1] = 0
    found, wanted = (GraphSession(path).run({"x": tokens})["down_value"] for path in (late, early))
    # A level may fall to the other side of a tie.
    assert (np.linalg.norm(found - wanted, axis=-1) <= 0.005 * np.linalg.norm(wanted, axis=-1)).all()
    assert (found[1, 1] == 0).all()
