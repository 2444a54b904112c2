"""Weights for processors whose u8 x s8 products saturate are computed right on any processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from hfaccel.quant.build import build_candidate
from hfaccel.quant.observed import CalibrationData, gather_statistics
from hfaccel.quant.per_token import PerTokenTrips
from hfaccel.quant.switches import EightBitTrips
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import new_initializer, save_graph
from hfaccel.runtime.session import GraphSession

TOKENS, INPUTS, OUTPUTS = 5, 96, 24
FORMATS = [WeightFormat(8, sums_in_16_bits=True), WeightFormat(7)]


def extreme(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A graph of one product, its activation and its result: the largest weights meet the largest activations."""
    weight = (np.where(np.arange(OUTPUTS) % 2, 1.0, -1.0) * np.ones((INPUTS, 1))).astype(np.float32)
    weight[::7] *= 0.5
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="one"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", INPUTS])
    activation = onnx_ir.node("Abs", [value], name="activation")
    product = onnx_ir.node("MatMul", [*activation.outputs, new_initializer(model, "weight", weight)], name="product")
    activation.outputs[0].name, product.outputs[0].name = "h", "y"
    result = onnx_ir.node("Identity", product.outputs, name="result")
    result.outputs[0].name, result.outputs[0].type = "z", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    model.graph.extend([activation, product, result])
    model.graph.inputs.append(value)
    model.graph.outputs.extend(result.outputs)
    folder.mkdir()
    x = np.full((1, TOKENS, INPUTS), 3.0, dtype=np.float32)
    x[:, :, ::5] = 2.0
    x[:, :, 1] = 0.0
    return save_graph(model, folder), x, x @ weight


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("scheme", ["dynamic", "static", "per-token"])
def test_no_product_saturates(scheme: str, weights: WeightFormat, tmp_path: Path) -> None:
    graph, x, exact = extreme(tmp_path / "float")
    batches = [{"x": x, "attention_mask": np.ones((1, TOKENS), dtype=np.int64)}]
    statistics = gather_statistics(graph, batches, tmp_path / "scratch")
    rung = Rung(name="eight", scheme=scheme, graph="optimized")  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    built = build_candidate(rung, graph, CalibrationData(batches, statistics), weights=weights, folder=tmp_path / "out")
    assert built.quantized == ("product",)
    found = GraphSession(built.path).run({"x": x})["z"]
    np.testing.assert_allclose(found, exact, rtol=0.01)


@pytest.mark.parametrize("weights", [WeightFormat(), *FORMATS], ids=str)
def test_a_trial_rounds_a_weight_to_levels_that_the_format_has(weights: WeightFormat) -> None:
    weight = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    steps = np.abs(weight).max(axis=0) / (2 ** (weights.bits - 1) - 1)
    if weights.sums_in_16_bits:
        first, second = weight[::2], weight[1::2]
        pairs = np.where(first * second > 0, np.abs(first + second), 0).max(axis=0)
        steps = np.maximum(steps, pairs / 127.5)
    for trips in (EightBitTrips(None, weights, per_channel=True), PerTokenTrips(weights)):
        made = trips.weight("any", weight)
        assert (np.abs(made - weight) <= 0.51 * steps).all()
        assert max(len(np.unique(column)) for column in made.T) <= 2**weights.bits
