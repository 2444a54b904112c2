"""Weights with one scale per channel, rounded by the moments of what is read: the products change less, and levels stay in range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from hfaccel.quant import channel_rounding
from hfaccel.quant.calibration import Feeds
from hfaccel.quant.channel_rounding import compensated_weights
from hfaccel.quant.channel_weight import LARGEST_PAIR, ChannelWeight, largest_pairs
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import new_initializer

WIDTH = 64
FORMATS = [WeightFormat(), WeightFormat(bits=7), WeightFormat(sums_in_16_bits=True)]


def two_products(*, shared: bool) -> onnx_ir.Model:
    """``first`` reads the input, ``second`` what a Tanh makes of its result; of one weight where it is shared."""
    random = np.random.default_rng(0)
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="two"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    made = [new_initializer(model, f"w{number}", random.normal(size=(WIDTH, WIDTH)).astype(np.float32)) for number in (1, 2)]
    first = onnx_ir.node("MatMul", [value, made[0]], name="first")
    bent = onnx_ir.node("Tanh", first.outputs, name="bent")
    second = onnx_ir.node("MatMul", [bent.outputs[0], made[0] if shared else made[1]], name="second")
    for node in (first, bent, second):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}_value", value.type
    model.graph.extend([first, bent, second])
    model.graph.inputs.append(value)
    model.graph.outputs.extend(second.outputs)
    return model


def texts(seed: int) -> list[Feeds]:
    """Tokens of few directions, as activations are, and with some large channels."""
    random = np.random.default_rng(seed)
    basis = np.random.default_rng(7).normal(size=(12, WIDTH))
    basis[:, 5] *= 20
    mask = np.ones((4, 32), dtype=np.int64)
    mask[1, 20:] = 0
    values = [random.normal(size=(4, 32, 12)) @ basis + random.normal(size=(4, 32, WIDTH)) * 0.1 for _ in range(8)]
    return [{"x": value.astype(np.float32), "attention_mask": mask} for value in values]


def weight_of(model: onnx_ir.Model, name: str) -> onnx_ir.Value:
    weight = next(node for node in model.graph if node.name == name).inputs[1]
    assert weight is not None
    return weight


def exact_weight(model: onnx_ir.Model, name: str) -> np.ndarray:
    constant = weight_of(model, name).const_value
    assert constant is not None
    return constant.numpy()


def tokens(feeds: list[Feeds]) -> np.ndarray:
    return np.concatenate([item["x"][item["attention_mask"].astype(bool)] for item in feeds])


@pytest.mark.parametrize("weights", FORMATS, ids=["8 bits", "7 bits", "sums in 16 bits"])
def test_products_on_other_texts_change_less_than_by_nearest_rounding(weights: WeightFormat, tmp_path: Path) -> None:
    model = two_products(shared=False)
    rounded = compensated_weights(model, ["first", "second"], texts(1), weights, workdir=tmp_path)
    exact, unseen = exact_weight(model, "first"), tokens(texts(2))
    made, nearest = rounded[weight_of(model, "first").name or ""], ChannelWeight.nearest(exact, weights)
    errors = [np.square(unseen @ (item.dequantized() - exact)).mean() for item in (made, nearest)]
    assert errors[0] < errors[1] / 2
    limit = 2 ** (weights.bits - 1)
    assert made.levels.dtype == np.int8
    assert -limit <= made.levels.min()
    assert made.levels.max() < limit
    if weights.sums_in_16_bits:
        assert largest_pairs(made.levels.astype(np.int32)).max() <= LARGEST_PAIR


def test_a_shared_weight_is_rounded_once_by_what_all_its_readers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = two_products(shared=True), []
    monkeypatch.setattr(channel_rounding, "MOST_BYTES", 4 * WIDTH * WIDTH)  # each activation in a pass of its own
    rounding = channel_rounding.compensated_channels

    def noted(weight: np.ndarray, moments: np.ndarray, weights: WeightFormat) -> object:
        seen.append(moments.copy())
        return rounding(weight, moments, weights)

    monkeypatch.setattr(channel_rounding, "compensated_channels", noted)
    rounded = compensated_weights(model, ["first", "second"], texts(1), WeightFormat(), workdir=tmp_path)
    assert len(rounded) == 1
    read = tokens(texts(1))
    between = np.tanh(read @ exact_weight(model, "first"))
    wanted = (read.T @ read + between.T @ between) / len(read)
    wanted += np.eye(WIDTH) * np.diag(wanted).mean() * channel_rounding.DAMPING
    np.testing.assert_allclose(seen, [wanted], rtol=1e-3, atol=1e-2)


def test_only_the_named_ones_are_rounded(tmp_path: Path) -> None:
    model = two_products(shared=False)
    [name] = compensated_weights(model, ["second"], texts(1), WeightFormat(), workdir=tmp_path)
    assert name == weight_of(model, "second").name
