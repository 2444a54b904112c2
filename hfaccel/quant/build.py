"""One rung of the ladder: float graph in, quantized graph out."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.quant.calibration import ActivationStatistics, Feeds, observe
from hfaccel.quant.outlier_neurons import feed_forward_blocks, split_outlier_neurons
from hfaccel.quant.scheme import matmul_sites
from hfaccel.quant.sensitivity import rank_by_sensitivity
from hfaccel.quant.smooth import smooth_activations
from hfaccel.quant.switches import SwitchedGraph
from hfaccel.rewrites.graphs import GRAPH_NAME, load_graph, save_graph

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import Rung

EXTERNAL_DATA_FROM_BYTES = 1 << 30
SENSITIVITY_TEXTS = 4
"""Texts that the ranking is measured on: it runs the graph once per MatMul, and a handful already orders them."""


@dataclass(frozen=True)
class BuiltCandidate:
    """A quantized graph on disk.

    Attributes:
        path: the graph.
        quantized: names of the MatMuls in 8 bit.
        kept_float: names of those left in float, most sensitive first, with their measured error.
        split_neurons: MatMuls of split-off outlier neurons (always float).
    """

    path: Path
    quantized: tuple[str, ...]
    kept_float: tuple[tuple[str, float], ...]
    split_neurons: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationData:
    """What a rung may learn from real text: padded batches, and statistics of the float graph's activations by name."""

    batches: Sequence[Feeds]
    statistics: Mapping[str, ActivationStatistics]


def gather_statistics(graph: Path, batches: Sequence[Feeds], workdir: Path) -> dict[str, ActivationStatistics]:
    """Statistics of every activation that a quantizable MatMul of the float graph reads; one pass serves all rungs."""
    model = load_graph(graph)
    statistics = observe(model, _activations(model), batches, workdir=workdir)
    shutil.rmtree(workdir, ignore_errors=True)
    return statistics


def build_candidate(
    rung: Rung,
    graph: Path,
    calibration: CalibrationData,
    *,
    weight_bits: int,
    folder: Path,
) -> BuiltCandidate:
    """Quantize one float graph as a rung of the ladder says.

    Args:
        rung: what to do.
        graph: the float graph; it is not changed.
        calibration: of this graph, statistics from :func:`gather_statistics`; may be empty only if the rung needs none.
        weight_bits: 7 for targets where u8 x s8 products saturate.
        folder: receives ``model.onnx``; scratch files are removed again.
    """
    model = load_graph(graph)
    scratch = folder / "scratch"
    batches, statistics = calibration.batches, dict(calibration.statistics)
    split: tuple[str, ...] = ()
    feed_forward_inputs = {block.down.inputs[0].name for block in feed_forward_blocks(model) if block.down.inputs[0] is not None}
    if rung.outlier_neurons:
        split = split_outlier_neurons(model, statistics, rung.outlier_neurons)
    if rung.smooth is not None:
        smooth_activations(model, statistics, rung.smooth, names=statistics.keys() - feed_forward_inputs, exclude=split)
    ranking: list[tuple[str, float]] = []
    if rung.keep_float:
        names = [site.node for site in matmul_sites(model) if site.node not in split]
        switched = SwitchedGraph(
            model, names, ranges=None, weight_bits=weight_bits, per_channel=rung.per_channel, workdir=scratch
        )
        ranking = rank_by_sensitivity(switched, _first_texts(batches))[: rung.keep_float]
    left_out = {*split, *(name for name, _ in ranking)}
    nodes = [site.node for site in matmul_sites(model) if site.node not in left_out]
    ranges: dict[str, tuple[float, float]] = {}
    if rung.scheme == "static":
        activations = _activations(model, nodes)
        if rung.calibration == "percentile":  # a histogram cannot be derived from that of the unchanged graph
            statistics = observe(model, activations, batches, workdir=scratch, histograms=True)
        ranges = {name: statistics[name].range(rung.calibration) for name in activations}
    prepared = _save_prepared(model, scratch)
    output = folder / GRAPH_NAME
    with _quiet():
        if rung.scheme == "dynamic":
            _quantize_dynamic(rung, prepared, nodes, output, weight_bits=weight_bits)
        else:
            _quantize_static(rung, prepared, nodes, ranges, output, weight_bits=weight_bits)
    shutil.rmtree(scratch, ignore_errors=True)
    return BuiltCandidate(output, tuple(nodes), tuple(ranking), split)


def _first_texts(batches: Sequence[Feeds]) -> list[Feeds]:
    return [{name: array[:SENSITIVITY_TEXTS] for name, array in batches[0].items()}]


def _activations(model: onnx_ir.Model, nodes: Collection[str] | None = None) -> list[str]:
    names = [site.activation for site in matmul_sites(model) if nodes is None or site.node in nodes]
    return list(dict.fromkeys(names))


def _save_prepared(model: onnx_ir.Model, folder: Path) -> Path:
    """Write the float graph for onnxruntime's quantizers, which trip over shapes recorded for initializers."""
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    path = save_graph(model, folder)
    proto = onnx.load(str(path), load_external_data=False)
    constants = {tensor.name for tensor in proto.graph.initializer}
    kept = [info for info in proto.graph.value_info if info.name not in constants]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.save(proto, str(path))
    return path


def _quantize_dynamic(rung: Rung, source: Path, nodes: Sequence[str], output: Path, *, weight_bits: int) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    operators = ["MatMul", *(["Gather"] if rung.quantize_embeddings else [])]
    quantize_dynamic(
        str(source),
        str(output),
        op_types_to_quantize=operators,
        nodes_to_quantize=[*nodes, *(_embedding_lookups(source) if rung.quantize_embeddings else [])],
        per_channel=rung.per_channel,
        reduce_range=weight_bits == 7,
        weight_type=QuantType.QInt8,
        use_external_data_format=_large(source),
        extra_options={"MatMulConstBOnly": True},
    )


def _quantize_static(
    rung: Rung, source: Path, nodes: Sequence[str], ranges: Mapping[str, tuple[float, float]], output: Path, *, weight_bits: int
) -> None:
    """QDQ with the ranges that we observed ourselves (onnxruntime's calibrators keep every activation in memory)."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    limits: dict[str, Any] = {
        name: (np.array(low, dtype=np.float32), np.array(high, dtype=np.float32)) for name, (low, high) in ranges.items()
    }
    quantizer = QDQQuantizer(
        onnx.load(str(source)),
        rung.per_channel,
        weight_bits == 7,
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, limits),
        list(nodes),
        [],
        ["MatMul"],
        {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(output), _large(source))


def _embedding_lookups(source: Path) -> list[str]:
    model = load_graph(source)
    return [
        node.name or ""
        for node in model.graph
        if node.op_type == "Gather"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is not None
        and len(node.inputs[0].const_value.shape) == 2
        and node.inputs[0].const_value.dtype.is_floating_point()
    ]


def _large(source: Path) -> bool:
    return sum(path.stat().st_size for path in source.parent.iterdir() if path.is_file()) > EXTERNAL_DATA_FROM_BYTES


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizers log one line per tensor at level INFO and advise preprocessing that we did ourselves."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
