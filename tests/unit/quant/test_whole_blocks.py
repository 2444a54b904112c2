"""Feed-forward blocks stay whole where their outlier neurons hardly matter: no more of them than together stay within the limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from hfaccel.quant.build import build_candidate
from hfaccel.quant.calibration import ActivationStatistics, Feeds
from hfaccel.quant.observed import CalibrationData, gather_statistics
from hfaccel.quant.whole_blocks import blocks_to_split, split_errors
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, new_initializer, save_graph
from hfaccel.runtime.session import GraphSession

WIDTH, NEURONS = 48, 192
LOUDNESS = (1.5, 4.0, 40.0)
"""Of one neuron in each block, against the others."""


def stream(model: onnx_ir.Model) -> None:
    """A residual stream with a feed-forward block for each loudness: MatMul, bias, Relu, MatMul, added to what it read."""
    random = np.random.default_rng(0)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    model.graph.inputs.append(value)
    for number, loudness in enumerate(LOUDNESS):
        up = random.normal(size=(WIDTH, NEURONS)).astype(np.float32) / WIDTH**0.5
        down = random.normal(size=(NEURONS, WIDTH)).astype(np.float32) / NEURONS**0.5
        up[:, 5] *= loudness
        down[5] /= loudness
        weights = [new_initializer(model, f"{name}_{number}", array) for name, array in (("up", up), ("down", down))]
        rising = onnx_ir.node("MatMul", [value, weights[0]], name=f"up_{number}")
        bias = new_initializer(model, f"bias_{number}", np.zeros(NEURONS, dtype=np.float32))
        biased = onnx_ir.node("Add", [rising.outputs[0], bias], name=f"biased_{number}")
        active = onnx_ir.node("Relu", biased.outputs, name=f"active_{number}")
        falling = onnx_ir.node("MatMul", [active.outputs[0], weights[1]], name=f"down_{number}")
        added = onnx_ir.node("Add", [falling.outputs[0], value], name=f"added_{number}")
        for node, width in ((rising, NEURONS), (biased, NEURONS), (active, NEURONS), (falling, WIDTH), (added, WIDTH)):
            output = node.outputs[0]
            output.name, output.type = f"{node.name}_value", value.type
            output.shape = onnx_ir.Shape(["batch", "sequence", width])
        model.graph.extend([rising, biased, active, falling, added])
        value = added.outputs[0]
    model.graph.outputs.append(value)


def texts(seed: int) -> list[Feeds]:
    random = np.random.default_rng(seed)
    mask = np.ones((4, 20), dtype=np.int64)
    return [{"x": random.normal(size=(4, 20, WIDTH)).astype(np.float32), "attention_mask": mask} for _ in range(12)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="stream"), ir_version=9)
    stream(model)
    return save_graph(model, tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def statistics(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActivationStatistics]:
    return gather_statistics(graph, texts(1), tmp_path_factory.mktemp("statistics") / "scratch")


def rung(limit: float) -> Rung:
    return Rung(name="a", scheme="static", graph="fused", outlier_neurons=16, whole_blocks=limit)


def to_split(graph: Path, statistics: dict[str, ActivationStatistics], limit: float, scratch: Path) -> tuple[str, ...]:
    return blocks_to_split(rung(limit), load_graph(graph), statistics, texts(1), scratch=scratch)


def test_the_louder_a_neuron_the_more_its_split_saves(
    graph: Path, statistics: dict[str, ActivationStatistics], tmp_path: Path
) -> None:
    errors = split_errors(load_graph(graph), statistics, 16, texts(2)[:2], workdir=tmp_path)
    assert sorted(errors, key=errors.__getitem__) == ["down_0", "down_1", "down_2"]
    assert errors["down_2"] > 20 * errors["down_1"] > 20 * errors["down_0"]


def test_the_limit_holds_for_the_blocks_together(
    graph: Path, statistics: dict[str, ActivationStatistics], tmp_path: Path
) -> None:
    errors = split_errors(
        load_graph(graph), statistics, 16, [{k: v[:4] for k, v in feeds.items()} for feeds in texts(1)[:2]], workdir=tmp_path
    )
    first, second, third = (errors[f"down_{number}"] for number in range(3))
    for squares, split in (
        (first * 0.9, ("down_0", "down_1", "down_2")),
        (first * 1.1, ("down_1", "down_2")),
        (second * 1.0001, ("down_1", "down_2")),  # enough for the second alone
        ((first + second) * 1.1, ("down_2",)),
        ((first + second + third) * 1.1, ()),
    ):
        assert to_split(graph, statistics, squares**0.5, tmp_path) == split


@pytest.mark.parametrize("limit", [0.003, 0.02])
def test_what_is_built_loses_no_more_than_the_limit(
    limit: float, graph: Path, statistics: dict[str, ActivationStatistics], tmp_path: Path
) -> None:
    """Errors of 8 bit are independent, so their squares add up."""
    unseen = texts(3)
    exact = [GraphSession(graph).run(feeds)["added_2_value"] for feeds in unseen]

    def error(limit: float, folder: str) -> float:
        (tmp_path / folder).mkdir()
        calibration = CalibrationData(texts(1), dict(statistics))
        built = build_candidate(rung(limit), graph, calibration, weights=WeightFormat(), folder=tmp_path / folder)
        session = GraphSession(built.path)
        found = [session.run(feeds)[session.output_names[0]] for feeds in unseen]
        moved = sum(float(np.square(left - right).sum()) for left, right in zip(found, exact, strict=True))
        return (moved / sum(float(np.square(array).sum()) for array in exact)) ** 0.5

    split, partly = error(0.0, "split"), error(limit, "partly")
    assert partly**2 < split**2 + 1.5 * limit**2
