"""Loud feed-forward neurons are scaled down, their readers up: the same answers, and a range that fits the others."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.calibration import ActivationStatistics
from hfaccel.quant.scaled_neurons import scale_neurons
from hfaccel.quant.scheme import matmul_sites
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import new_initializer
from tests.unit.quant.conftest import answers, finish_graph, statistics_of

WIDTH, NEURONS = 24, 96


def block(activation: str, seed: int, loud: dict[int, float]) -> onnx_ir.Model:
    """MatMul ``up``, a bias, the activation and MatMul ``down``; some neurons are so many times louder."""
    random = np.random.default_rng(seed)
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="block"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    up, bias = (
        random.normal(size=(WIDTH, NEURONS)).astype(np.float32) / WIDTH**0.5,
        random.normal(size=NEURONS).astype(np.float32) / 4,
    )
    for neuron, times in loud.items():
        up[:, neuron] *= times
    down = random.normal(size=(NEURONS, WIDTH)).astype(np.float32)
    constants = {name: new_initializer(model, name, array) for name, array in {"w1": up, "b1": bias, "w2": down}.items()}
    rising = onnx_ir.node("MatMul", [value, constants["w1"]], name="up")
    biased = onnx_ir.node("Add", [rising.outputs[0], constants["b1"]], name="biased")
    active = onnx_ir.node(activation, biased.outputs, name="active")
    falling = onnx_ir.node("MatMul", [active.outputs[0], constants["w2"]], name="down")
    return finish_graph(model, value, {rising: NEURONS, biased: NEURONS, active: NEURONS, falling: WIDTH})


@pytest.mark.parametrize(("activation", "operators"), [("Relu", 0), ("Gelu", 1)])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_answers_stay_and_the_loud_neurons_set_the_range_no_more(activation: str, operators: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(2, 13, WIDTH)).astype(np.float32)
    model = block(activation, seed, {3: 30.0, 70: 200.0})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        wanted, before = answers(model, values, folder / "before"), len(list(model.graph))
        statistics = statistics_of(model, values, folder)
        loud = next(site.activation for site in matmul_sites(model) if site.node == "down")
        whole_range = statistics[loud].range("minmax")[1]
        assert scale_neurons(model, statistics, 0.03) == 1
        drop_unused(model)
        np.testing.assert_allclose(answers(model, values, folder / "after"), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        assert len(list(model.graph)) == before + operators
        scaled = next(site.activation for site in matmul_sites(model) if site.node == "down")
        found = statistics[scaled].range("minmax")
        np.testing.assert_allclose(found, statistics_of(model, values, folder)[scaled].range("minmax"), rtol=1e-5, atol=1e-6)
        assert found[1] < whole_range / 10


def test_a_block_whose_neurons_are_alike_is_left_as_it_is() -> None:
    model = block("Gelu", 0, {})
    statistics = {"active_value": ActivationStatistics(np.zeros(NEURONS, dtype=np.float32), np.ones(NEURONS, dtype=np.float32))}
    assert scale_neurons(model, statistics, 0.03) == 0
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Gelu", "MatMul", "Neg"]


def test_dead_neurons_and_what_was_never_seen_are_left_as_they_are() -> None:
    model = block("Relu", 0, {})
    maximum = np.zeros(NEURONS, dtype=np.float32)
    maximum[0] = 5  # all others are dead on the texts seen: nothing to scale to
    assert scale_neurons(model, {"active_value": ActivationStatistics(np.zeros_like(maximum), maximum)}, 0.03) == 0
    assert scale_neurons(model, {}, 0.03) == 0
