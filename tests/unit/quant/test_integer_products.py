"""Products of 8 bit in the operators of an engine: what is near stays near, and nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from hfaccel.quant.integer_products import store_dynamic, store_static
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, new_initializer, operator_counts, save_graph
from hfaccel.runtime.session import GraphSession

CHANNELS = 64
ANYWHERE = WeightFormat(sums_in_16_bits=True)
NAMES = ["first", "second", "third", "last"]
RANGES = {"x": (-6.0, 6.0), "h": (0.0, 40.0), "s": (-250.0, 250.0)}
Store = Callable[[onnx_ir.Model], None]


def static(model: onnx_ir.Model, *, per_channel: bool = True) -> None:
    store_static(model, NAMES, RANGES, ANYWHERE, per_channel=per_channel)


def portable(model: onnx_ir.Model, *, per_channel: bool = True) -> None:
    store_static(model, NAMES, RANGES, ANYWHERE, per_channel=per_channel, portable=True)


def dynamic(model: onnx_ir.Model, *, per_channel: bool = True) -> None:
    store_dynamic(model, NAMES, ANYWHERE, per_channel=per_channel)


WAYS = [static, portable, dynamic]


def two_layers() -> onnx_ir.Model:
    """``first`` and ``second`` read x; the first has a bias and feeds ``third``, which shares its weight; ``last`` is an output.

    The second's result is added to a constant that is no bias: [1, tokens, channels] wide.
    """
    random = np.random.default_rng(1)
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="two"), ir_version=9)
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", 5, CHANNELS])
    model.graph.inputs.append(x)
    for name in ("one", "two", "three"):
        new_initializer(model, name, random.normal(size=(CHANNELS, CHANNELS)).astype(np.float32))
    for name, shape in (("bias", (CHANNELS,)), ("positions", (1, 5, CHANNELS))):
        new_initializer(model, name, random.normal(size=shape).astype(np.float32))
    values = {"x": x, **model.graph.initializers}
    for operator, name, operands, result in (
        ("MatMul", "first", ("x", "one"), "a"),
        ("Add", "biased", ("bias", "a"), "b"),
        ("Relu", "active", ("b",), "h"),
        ("MatMul", "second", ("x", "two"), "c"),
        ("Add", "placed", ("c", "positions"), "d"),
        ("MatMul", "third", ("h", "one"), "e"),
        ("Add", "summed", ("e", "d"), "s"),
        ("MatMul", "last", ("s", "three"), "y"),
    ):
        node = onnx_ir.node(operator, [values[name] for name in operands], name=name)
        node.outputs[0].name = result
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        node.outputs[0].shape = onnx_ir.Shape(["batch", 5, CHANNELS])
        model.graph.append(node)
        values[result] = node.outputs[0]
    model.graph.outputs.append(values["y"])
    return model


def answers(model: onnx_ir.Model, folder: Path) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    x = np.random.default_rng(2).uniform(-2, 2, size=(3, 5, CHANNELS)).astype(np.float32)
    (found,) = GraphSession(save_graph(model, folder)).run({"x": x}).values()
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_answers_stay_near_and_keep_their_name(way: Callable[..., None], per_channel: bool, tmp_path: Path) -> None:
    exact = answers(two_layers(), tmp_path / "float")
    model = two_layers()
    way(model, per_channel=per_channel)
    found = answers(model, tmp_path / "integers")
    assert list(GraphSession(tmp_path / "integers" / "model.onnx").output_names) == ["y"]
    assert 0 < np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)


def test_a_bias_is_added_by_the_product_and_nothing_else_is(tmp_path: Path) -> None:
    for way in (static, dynamic):
        model = two_layers()
        way(model)
        assert [node.name for node in model.graph if node.op_type == "Add"] == ["placed", "summed"]
        assert {node.name for node in model.graph} >= set(NAMES)  # a profile names the products as the float graph did


def test_activations_and_weights_that_are_shared_are_rounded_once() -> None:
    for way, operator, count in ((static, "QuantizeLinear", 3), (dynamic, "DynamicQuantizeLinear", 1)):
        model = two_layers()
        way(model)
        assert operator_counts(model)[operator] == count
        stored = [name for name, value in model.graph.initializers.items() if value.dtype == onnx_ir.DataType.INT8]
        assert sorted(stored) == ["one_levels", "three_levels", "two_levels"]
    model = two_layers()
    dynamic(model)
    counts = operator_counts(model)
    assert (counts["MatMulIntegerToFloat"], counts["DynamicQuantizeMatMul"]) == (2, 2)


def test_other_engines_get_standard_operators_alone(tmp_path: Path) -> None:
    model = two_layers()
    portable(model)
    save_graph(model, tmp_path)
    assert {node.domain for node in load_graph(tmp_path / "model.onnx").graph} == {""}
    counts = operator_counts(model)
    assert (counts["MatMul"], counts["QuantizeLinear"], counts["DequantizeLinear"]) == (4, 3, 6)


def test_both_forms_of_a_calibrated_graph_say_the_same(tmp_path: Path) -> None:
    found = []
    for way in (static, portable):
        model = two_layers()
        way(model)
        found.append(answers(model, tmp_path / way.__name__))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-2)
