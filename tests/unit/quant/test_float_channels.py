"""Channels that stand out in what a MatMul reads stay in float: no answer changes, and ranges are those of what is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from hfaccel.quant.float_channels import NEURONS, keep_channels
from hfaccel.quant.scheme import matmul_sites
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import new_initializer
from tests.unit.quant.conftest import answers, finish_graph, statistics_of

WIDTH, NEURON_COUNT = 48, 96
LOUD_CHANNEL, LOUD_NEURON = 7, 41


def feed_forward(seed: int) -> onnx_ir.Model:
    """MatMul ``first``, then a block of ``up``, a bias, Relu and ``down``; one neuron of it is loud."""
    random = np.random.default_rng(seed)
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="block"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    up = random.normal(size=(WIDTH, NEURON_COUNT)).astype(np.float32)
    bias = random.normal(size=NEURON_COUNT).astype(np.float32)
    up[:, LOUD_NEURON], bias[LOUD_NEURON] = up[:, LOUD_NEURON] * 300, 3000
    weights = {
        "first": random.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5,
        "up": up,
        "down": random.normal(size=(NEURON_COUNT, WIDTH)).astype(np.float32),
    }
    constants = {name: new_initializer(model, f"{name}.weight", array) for name, array in weights.items()}
    first = onnx_ir.node("MatMul", [value, constants["first"]], name="first")
    rising = onnx_ir.node("MatMul", [first.outputs[0], constants["up"]], name="up")
    biased = onnx_ir.node("Add", [rising.outputs[0], new_initializer(model, "up.bias", bias)], name="biased")
    active = onnx_ir.node("Relu", biased.outputs, name="active")
    down = onnx_ir.node("MatMul", [active.outputs[0], constants["down"]], name="down")
    widths = {first: WIDTH, rising: NEURON_COUNT, biased: NEURON_COUNT, active: NEURON_COUNT, down: WIDTH}
    return finish_graph(model, value, widths)


def some_tokens(seed: int, *, loudness: float = 200) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(3, 11, WIDTH)).astype(np.float32)
    values[..., LOUD_CHANNEL] *= loudness
    return values


@pytest.mark.parametrize("neurons", [True, False], ids=["neurons are split", "channels are picked everywhere"])
def test_no_answer_changes_and_the_ranges_are_those_of_the_rest(neurons: bool, tmp_path: Path) -> None:
    values, model = some_tokens(1), feed_forward(0)
    wanted = answers(model, values, tmp_path / "before")
    statistics = statistics_of(model, values, tmp_path)
    kept = keep_channels(model, statistics, ["first", "down"], neurons=neurons)
    drop_unused(model)
    np.testing.assert_allclose(answers(model, values, tmp_path / "after"), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert list(kept) == (["down", "first"] if neurons else ["first", "down"])
    assert len(kept["down"]) == (2 if neurons else 1)

    activations = {site.node: site.activation for site in matmul_sites(model)}
    nodes = {node.name: node for node in model.graph}
    assert all(name in nodes for parts in kept.values() for name in parts)
    observed = statistics_of(model, values, tmp_path)
    for name in ("first", "down"):
        rest = statistics[activations[name]]
        np.testing.assert_allclose(rest.range("minmax"), observed[activations[name]].range("minmax"), rtol=1e-5)
        limit = np.median(rest.channel_abs_max) * 20
        assert rest.channel_abs_max.max() < limit < 200 * np.median(rest.channel_abs_max)
    width = (nodes["down"].inputs[0].shape or ())[-1]
    assert width == (NEURON_COUNT - NEURONS if neurons else NEURON_COUNT)


def test_both_products_of_a_block_may_be_fragile(tmp_path: Path) -> None:
    """The first one then has fewer outputs, of which the channels that it keeps must know."""
    values, model = some_tokens(4), feed_forward(0)
    first, up = (next(node for node in model.graph if node.name == name) for name in ("first", "up"))
    up.replace_input_with(0, model.graph.inputs[0])  # reads the loud channel itself
    model.graph.remove(first, safe=True)
    wanted = answers(model, values, tmp_path / "before")
    statistics = statistics_of(model, values, tmp_path)
    kept = keep_channels(model, statistics, ["up", "down"], neurons=True)
    drop_unused(model)
    assert {name: len(parts) for name, parts in kept.items()} == {"down": 2, "up": 1}
    np.testing.assert_allclose(answers(model, values, tmp_path / "after"), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_what_is_not_named_or_has_none_is_left_whole(tmp_path: Path) -> None:
    values, model = some_tokens(2, loudness=3), feed_forward(0)
    before = [node.op_type for node in model.graph]
    statistics = statistics_of(model, values, tmp_path)
    assert keep_channels(model, statistics, ["first", "up"], neurons=True) == {}  # the loud neuron is an input of neither
    assert [node.op_type for node in model.graph] == before
