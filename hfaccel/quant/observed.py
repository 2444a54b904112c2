"""What calibration looks at in a float graph, and what a rung of the scheme ``static`` takes from it."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.quant.calibration import ActivationStatistics, Feeds, observe
from hfaccel.quant.convolutions import convolution_inputs
from hfaccel.quant.eight_bit_scores import score_operands
from hfaccel.quant.eight_bit_shares import attention_values, center_all_values, harmless, share_errors
from hfaccel.quant.scheme import matmul_sites
from hfaccel.rewrites.graphs import load_graph
from hfaccel.rewrites.split_encoder_decoder import decoder_nodes, split_encoder_decoder

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import Rung

FIRST_TEXTS = 4
"""Of a batch. The ranking by sensitivity runs the graph once per MatMul, and a handful already orders them."""
SHARE_BATCHES = 3
"""Calibration batches whose first texts show what rounded shares of attention do; fewer where that took more runs than calibration."""


@dataclass(frozen=True)
class CalibrationData:
    """What a rung may learn from real text: padded batches, and statistics of the float graph's activations by name."""

    batches: Sequence[Feeds]
    statistics: Mapping[str, ActivationStatistics]


def gather_statistics(graph: Path, batches: Sequence[Feeds], workdir: Path) -> dict[str, ActivationStatistics]:
    """Statistics of every activation that a quantizable MatMul, fused attention or a convolution reads; one pass serves all rungs.

    Of an encoder-decoder those of the encoder, which reads ``batches`` of sources.
    """
    model = calibrated_part(load_graph(graph))
    statistics = observe(model, _observed(model), batches, workdir=workdir)
    shutil.rmtree(workdir, ignore_errors=True)
    return statistics


def covers(statistics: Mapping[str, ActivationStatistics], graph: Path) -> bool:
    """Whether statistics of another graph of the same model serve this one: exact rewrites keep the names of what they leave as it is."""
    return statistics.keys() >= set(_observed(calibrated_part(load_graph(graph))))


def calibrated_part(model: onnx_ir.Model) -> onnx_ir.Model:
    """What reads calibration data: of an encoder-decoder the encoder, of others all of it."""
    return split_encoder_decoder(model)[0] if decoder_nodes(model) else model


def activations(model: onnx_ir.Model, nodes: Collection[str] | None = None) -> list[str]:
    """Names of what the quantizable MatMuls of a graph read, or those of them that are named."""
    names = [site.activation for site in matmul_sites(model) if nodes is None or site.node in nodes]
    return list(dict.fromkeys(names))


def first_texts(batches: Sequence[Feeds]) -> list[Feeds]:
    """The few texts of each batch that show what is looked for: sensitivity, or massive channels."""
    return [{name: array[:FIRST_TEXTS] for name, array in batch.items()} for batch in batches]


def attentions_to_round(
    rung: Rung, model: onnx_ir.Model, statistics: dict[str, ActivationStatistics], batches: Sequence[Feeds], *, scratch: Path
) -> tuple[str, ...]:
    """Names of the attentions that can do with shares and values of 8 bit; where there are some, the values of all are centered for it.

    Args:
        rung: says how much the outputs may move.
        model: a float graph; changed in place, exactly.
        statistics: of it; those of centered values and of what attention gives are changed with it.
        batches: of calibration.
        scratch: where graphs may lie meanwhile.
    """
    trial, centered = model.clone(), dict(statistics)
    center_all_values(trial, centered)
    calibrated = calibrated_part(trial)
    ranges = {name: centered[name].range("minmax") for name in attention_values(calibrated) if name in centered}
    few = max(1, min(SHARE_BATCHES, len(batches) // (1 + len(ranges))))
    errors = share_errors(calibrated, ranges, first_texts(batches[:few]), workdir=scratch)
    chosen = harmless(errors, rung.eight_bit_shares)
    if chosen:
        center_all_values(model, statistics)
    return chosen


def static_ranges(
    rung: Rung,
    model: onnx_ir.Model,
    matmuls: Collection[str],
    statistics: Mapping[str, ActivationStatistics],
    batches: Sequence[Feeds],
    *,
    scratch: Path,
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value, by name, of everything that a rung of the scheme ``static`` may round.

    Args:
        rung: says how ranges are found, and what is rounded beside MatMuls.
        model: the rewritten float graph.
        matmuls: names of those that can be quantized.
        statistics: of it.
        batches: of calibration.
        scratch: where graphs may lie meanwhile.
    """
    calibrated = calibrated_part(model)
    read = activations(calibrated, matmuls)
    of_read = statistics
    if rung.calibration == "percentile":  # a histogram cannot be derived from that of the unchanged graph
        of_read = observe(calibrated, read, batches, workdir=scratch, histograms=True)
    ranges = {name: of_read[name].range(rung.calibration) for name in read}
    others = (*score_operands(calibrated), *attention_values(calibrated)) if rung.eight_bit_scores else ()
    others += convolution_inputs(calibrated) if rung.eight_bit_convolutions else ()
    return ranges | {name: statistics[name].range("minmax") for name in others}


def _observed(model: onnx_ir.Model) -> list[str]:
    """What the statistics of a float graph are of."""
    attended = (*score_operands(model), *attention_values(model))
    return list(dict.fromkeys((*activations(model), *attended, *convolution_inputs(model))))
