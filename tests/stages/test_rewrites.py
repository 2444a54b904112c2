"""Exact rewrites: the same numbers, fewer or moved operators; nothing else may change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.calibration import ActivationStatistics, observe
from hfaccel.quant.outlier_neurons import feed_forward_blocks, split_outlier_neurons
from hfaccel.quant.scheme import matmul_sites
from hfaccel.quant.sensitivity import rank_by_sensitivity
from hfaccel.quant.smooth import smooth_activations, smoothing_scale
from hfaccel.quant.switches import EightBitTrips, SwitchedGraph
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, save_graph
from hfaccel.rewrites.last_layer_pooled_token import run_last_layer_for_pooled_token
from hfaccel.rewrites.name_symbols import name_symbols
from hfaccel.runtime.session import GraphSession

HIDDEN = 32


class Block(torch.nn.Module):
    """A post-norm feed-forward block over embeddings, pooled at the first position, with two outlier neurons."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(50, HIDDEN)
        self.up = torch.nn.Linear(HIDDEN, 128)
        self.down = torch.nn.Linear(128, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, 3)
        with torch.no_grad():
            self.up.weight[[7, 90]] *= 60

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        hidden = self.norm(hidden + self.down(torch.nn.functional.gelu(self.up(hidden))))
        return self.head(hidden[:, 0])


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(0, 50, (2, 9))
    batch, sequence = torch.export.Dim("b"), torch.export.Dim("s", min=1, max=64)
    shapes = {name: {0: batch, 1: sequence} for name in ("input_ids", "attention_mask")}
    program = torch.onnx.export(
        Block().eval(), kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, dynamo=True, dynamic_shapes=shapes
    )
    assert program is not None
    return save_graph(program.model, tmp_path_factory.mktemp("graph"))


def feeds(seed: int, batch: int = 3, length: int = 11) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    mask = np.ones((batch, length), dtype=np.int64)
    mask[-1, length // 2 :] = 0
    return {"input_ids": generator.integers(0, 50, (batch, length)), "attention_mask": mask}


def answers(model: onnx_ir.Model, folder: Path, seed: int = 1) -> np.ndarray:
    session = GraphSession(save_graph(model, folder))
    return session.run(feeds(seed))[session.output_names[0]]


def test_last_layer_runs_for_the_pooled_token_only(graph: Path, tmp_path: Path) -> None:
    model = load_graph(graph)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before = answers(model, tmp_path / "a")
    model = load_graph(graph)
    assert run_last_layer_for_pooled_token(model) == 1
    assert run_last_layer_for_pooled_token(model) == 0  # a second time there is nothing to move
    down = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert list(down.outputs[0].shape or ())[1] == 1
    np.testing.assert_allclose(answers(model, tmp_path / "b"), before, atol=1e-5)


def test_a_selection_of_another_position_is_left_alone(graph: Path) -> None:
    model = load_graph(graph)
    gather = next(node for node in model.graph if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 1)
    name = "second_position"
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.array(1, dtype=np.int64), name=name))
    model.graph.register_initializer(value)
    gather.replace_input_with(1, value)
    assert run_last_layer_for_pooled_token(model) == 0


def test_symbols_get_readable_names(graph: Path) -> None:
    model = load_graph(graph)
    assert name_symbols(model) > 0
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["batch", "sequence"]
    assert name_symbols(model) == 0


def test_splitting_outlier_neurons_is_exact_and_takes_the_outliers(graph: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    before = answers(load_graph(graph), tmp_path / "a")
    model = load_graph(graph)
    block = feed_forward_blocks(model)[0]
    name = block.down.inputs[0].name if block.down.inputs[0] is not None else ""
    statistics = observe(model, [name or ""], [feeds(seed) for seed in range(4)], workdir=tmp_path / "b")
    worst = set(np.argsort(-statistics[name or ""].channel_abs_max)[:2])
    assert worst == {7, 90}
    kept = split_outlier_neurons(model, statistics, 2)
    assert len(kept) == 2
    np.testing.assert_allclose(answers(model, tmp_path / "c"), before, atol=1e-4)


@pytest.mark.parametrize(("largest", "split"), [(1.3, 0), (1.5, 2)])
def test_a_block_whose_neurons_are_alike_is_left_whole(largest: float, split: int, graph: Path) -> None:
    model = load_graph(graph)
    value = feed_forward_blocks(model)[0].down.inputs[0]
    assert value is not None
    assert value.name is not None
    maximum = np.ones(128, dtype=np.float32)
    maximum[5] = largest
    statistics = {value.name: ActivationStatistics(-maximum / 10, maximum)}
    assert len(split_outlier_neurons(model, statistics, 2)) == split


def test_smoothing_is_exact(graph: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    before = answers(load_graph(graph), tmp_path / "a")
    model = load_graph(graph)
    names = [site.activation for site in matmul_sites(model)]
    statistics = observe(model, names, [feeds(2)], workdir=tmp_path / "b")
    assert smooth_activations(model, statistics, 0.6, names=names) == len(set(names))
    np.testing.assert_allclose(answers(model, tmp_path / "c"), before, atol=1e-4)


def test_statistics_follow_the_rewrites(graph: Path, tmp_path: Path) -> None:
    """Ranges derived from one pass over the unchanged graph are those that a pass over the changed graph would find."""
    for name in "ab":
        (tmp_path / name).mkdir()
    model, texts = load_graph(graph), [feeds(seed) for seed in range(3)]
    names = [site.activation for site in matmul_sites(model)]
    statistics = observe(model, names, texts, workdir=tmp_path / "a")
    split = split_outlier_neurons(model, statistics, 2)
    smooth_activations(model, statistics, 0.6, names=names, exclude=split)
    sites = [site.activation for site in matmul_sites(model) if site.node not in split]
    observed = observe(model, sites, texts, workdir=tmp_path / "b")
    assert any(name.endswith("_smoothed") for name in sites)
    for name in sites:
        np.testing.assert_allclose(statistics[name].range("minmax"), observed[name].range("minmax"), rtol=1e-4, atol=1e-4)


def test_the_outlier_product_is_the_most_sensitive(graph: Path, tmp_path: Path) -> None:
    model = load_graph(graph)
    names = [site.node for site in matmul_sites(model)]
    switched = SwitchedGraph(model, names, EightBitTrips(None, WeightFormat(), per_channel=True), workdir=tmp_path)
    ranking = rank_by_sensitivity(switched, [feeds(5)])
    block = feed_forward_blocks(model)[0]
    assert ranking[0][0] == block.down.name
    assert ranking[0][1] > 2 * ranking[1][1]


@given(st.lists(st.floats(0, 1e4), min_size=4, max_size=4), st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_smoothing_scale_is_finite_even_for_dead_channels(values: list[float], alpha: float) -> None:
    scale = smoothing_scale(np.array(values), [np.zeros((4, 3), dtype=np.float32)], alpha)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=2, max_size=200), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_streamed_statistics_equal_those_of_the_whole(values: list[float], parts: int) -> None:
    array = np.array(values, dtype=np.float32).reshape(-1, 1)
    statistics = ActivationStatistics.empty(1)
    for part in np.array_split(array, min(parts, len(array))):
        statistics.update(part, histogram=True)
    assert statistics.range("minmax") == (min(0.0, float(array.min())), max(0.0, float(array.max())))
    assert statistics.histogram.sum() == array.size
    assert len(statistics.histogram) == 2048  # memory does not grow with the number of texts
    low, high = statistics.range("percentile")
    smallest, largest = statistics.range("minmax")
    assert smallest <= low <= 0 <= high <= largest
