"""One rung of the ladder: float graph in, quantized graph out."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.errors import RecipeError
from hfaccel.quant.calibration import Feeds, observe
from hfaccel.quant.channel_rounding import compensated_weights
from hfaccel.quant.convolutions import store_convolutions
from hfaccel.quant.eight_bit_scores import round_score_operands
from hfaccel.quant.eight_bit_shares import spell_out_rounded
from hfaccel.quant.float_channels import keep_channels
from hfaccel.quant.gptq import store_compensated, store_nearest
from hfaccel.quant.integer_products import store_dynamic, store_static
from hfaccel.quant.layers import has_eight_bits, part_of, weight_name
from hfaccel.quant.massive_channels import MassiveChannels, find_massive_channels, split_massive_channels
from hfaccel.quant.methods import MOMENT_ROUNDINGS, scale_first
from hfaccel.quant.more_bits import float_weights, write_with_eight_bits
from hfaccel.quant.observed import CalibrationData, activations, attentions_to_round, first_texts, static_ranges
from hfaccel.quant.outlier_neurons import feed_forward_blocks, split_outlier_neurons
from hfaccel.quant.per_token import PerTokenTrips, store_per_token
from hfaccel.quant.prompt_graph import write_prompt_graph
from hfaccel.quant.quantize_cache import CacheBits, quantize_cache, why_no_quantized_cache
from hfaccel.quant.scaled_neurons import scale_neurons
from hfaccel.quant.scheme import matmul_sites
from hfaccel.quant.sensitivity import rank_by_sensitivity
from hfaccel.quant.smooth import smooth_activations
from hfaccel.quant.split_head import split_head
from hfaccel.quant.switches import EightBitTrips, RoundTrips, SwitchedGraph
from hfaccel.quant.weight_only import BlockwiseTrips, quantize_tables, save_compact, store_in_blocks, write_weight_only
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import load_graph
from hfaccel.rewrites.mask_always import mask_always
from hfaccel.rewrites.rotate_residual import NOT_ROTATABLE, rotate_residual
from hfaccel.rewrites.score_at_once import score_in_blocks, scores_at_once
from hfaccel.rewrites.split_encoder_decoder import decoder_nodes
from hfaccel.rewrites.unpack_projections import unpack_projections

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import Rung

MASSIVE_BATCHES = 2
"""Calibration batches whose first texts are looked through for massive channels: every text has them, at its first token."""


@dataclass(frozen=True)
class BuiltCandidate:
    """A quantized graph on disk.

    Attributes:
        path: the graph.
        quantized: names of the MatMuls that are no longer in float, those in blocks among them.
        kept_float: names of those left in float, most sensitive first, with their measured error.
        split_neurons: MatMuls of split-off outlier neurons (always float).
    """

    path: Path
    quantized: tuple[str, ...]
    kept_float: tuple[tuple[str, float], ...]
    split_neurons: tuple[str, ...]


@dataclass(frozen=True)
class PreparedGraph:
    """A float graph after the exact rewrites of a rung, and what quantizing it needs.

    Attributes:
        model: the rewritten float graph.
        matmuls: names of the MatMuls that can be quantized, in graph order.
        split: names of those of split-off outlier neurons, which cannot.
        ranges: of the activations by name, for the static scheme, and of queries and keys; None for the others.
        batches: calibration texts, for the method gptq.
        in_channels: MatMuls that read what a rotated norm gives, whose weights have one scale per channel for the graph for prompts.
        to_turn: all others that such a graph computes in 8 bit.
        massive: channels of those that such a graph computes in float.
        round_shares: names of the attentions that round shares and values to 8 bit.
        channelwise: those of ``outlier_matmuls`` that have channels which stand out, now in float.
    """

    model: onnx_ir.Model
    matmuls: tuple[str, ...]
    split: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]] | None
    batches: Sequence[Feeds]
    in_channels: tuple[str, ...] = ()
    to_turn: tuple[str, ...] = ()
    massive: Mapping[str, MassiveChannels] = field(default_factory=dict)
    round_shares: tuple[str, ...] = ()
    channelwise: tuple[str, ...] = ()


def build_candidate(
    rung: Rung,
    graph: Path,
    calibration: CalibrationData,
    *,
    weights: WeightFormat,
    folder: Path,
) -> BuiltCandidate:
    """Quantize one float graph as a rung of the ladder says.

    Args:
        rung: what to do.
        graph: the float graph; it is not changed.
        calibration: of this graph, statistics from :func:`gather_statistics`; may be empty only if the rung needs none.
        weights: how the target wants them stored; the scheme weight-only has bits of its own.
        folder: receives ``model.onnx``; scratch files are removed again.

    Raises:
        RecipeError: ``rung.float_matmuls`` names a MatMul that the graph does not have.
    """
    scratch = folder / "scratch"
    prepared = prepare_graph(rung, graph, calibration, scratch=scratch)
    ranking: list[tuple[str, float]] = []
    if rung.keep_float:
        switched = switched_graph(rung, prepared, weights=weights, workdir=scratch)
        ranking = rank_by_sensitivity(switched, first_texts(calibration.batches[:1]))[: rung.keep_float]
    kept_float = (*ranking, *((name, 0.0) for name in rung.float_matmuls))
    built = quantize_graph(rung, prepared, kept_float, weights=weights, folder=folder)
    bits = cache_bits(rung, graph)
    if bits is not None:
        quantize_cache(built.path, graph, calibration.batches, bits)
    shutil.rmtree(scratch, ignore_errors=True)
    return built


def cache_bits(rung: Rung, graph: Path) -> CacheBits | None:
    """Of a key or value when a rung is built from a float graph; None: they stay in float32."""
    if rung.cache_bits != "auto":
        return rung.cache_bits
    return 8 if why_no_quantized_cache(load_graph(graph)) is None else None


def prepare_graph(rung: Rung, graph: Path, calibration: CalibrationData, *, scratch: Path) -> PreparedGraph:
    """Load a float graph, rewrite it as the rung says (exact in float arithmetic), and find the ranges of its activations."""
    model = load_graph(graph)
    if rung.masks_always:
        mask_always(model)
    statistics = dict(calibration.statistics)
    read_norms = _rotate(rung, model, graph) if rung.rotate else ()
    head_parts = split_head(model) if rung.split_head else {}
    read_norms = tuple(part for name in read_norms for part in head_parts.get(name, (name,)))
    round_shares = (
        attentions_to_round(rung, model, statistics, calibration.batches, scratch=scratch) if rung.eight_bit_shares else ()
    )
    split: tuple[str, ...] = ()
    feed_forward_inputs = {block.down.inputs[0].name for block in feed_forward_blocks(model) if block.down.inputs[0] is not None}
    massive = _massive(rung, model, graph, calibration, exclude=read_norms, scratch=scratch) if rung.massive_channels else {}
    if massive and not rung.prompt_graph:
        split, massive = split_massive_channels(model, massive), {}
    if rung.outlier_neurons:
        split = split_outlier_neurons(model, statistics, rung.outlier_neurons)
    if rung.smooth is not None:
        smooth_activations(model, statistics, rung.smooth, names=statistics.keys() - feed_forward_inputs, exclude=split)
    if rung.scaled_neurons:
        scale_neurons(model, statistics, rung.scaled_neurons)
    kept_channels: dict[str, tuple[str, ...]] = {}
    if rung.outlier_matmuls:
        kept_channels = keep_channels(model, statistics, rung.outlier_matmuls, neurons=not rung.outlier_neurons)
        split += tuple(name for names in kept_channels.values() for name in names)
    drop_unused(model)  # the weights from before the rewrites, as large as the model itself
    matmuls = tuple(site.node for site in matmul_sites(model) if site.node not in split)
    ranges = None
    if rung.scheme == "static":
        ranges = static_ranges(rung, model, matmuls, statistics, calibration.batches, scratch=scratch)
    in_channels = tuple(name for name in matmuls if name in read_norms) if rung.prompt_graph else ()
    to_turn = tuple(name for name in _but_head(model, matmuls) if name not in read_norms) if rung.prompt_graph else ()
    return PreparedGraph(
        model, matmuls, split, ranges, calibration.batches, in_channels, to_turn, massive, round_shares, tuple(kept_channels)
    )


def _rotate(rung: Rung, model: onnx_ir.Model, graph: Path) -> tuple[str, ...]:
    """Names of the MatMuls that read a norm of the rotated stream; none where ``auto`` leaves a stream of another form as it is."""
    names = rotate_residual(model)
    if not names and rung.rotate != "auto":
        raise RecipeError(
            NOT_ROTATABLE,
            where=str(graph),
            hint=f"give the rung {rung.name} rotate: auto, or leave it out of the ladder of this architecture",
        )
    return names


def _massive(
    rung: Rung, model: onnx_ir.Model, graph: Path, calibration: CalibrationData, *, exclude: Collection[str], scratch: Path
) -> dict[str, MassiveChannels]:
    """Massive channels of a rewritten graph, seen in the float one; looked for where a rotation has not spread them, and not before the head."""
    floating = load_graph(graph)
    names = set(_but_head(floating, [site.node for site in matmul_sites(floating)])) - set(exclude)
    texts = first_texts(calibration.batches[:MASSIVE_BATCHES])
    statistics = observe(floating, activations(floating, names), texts, workdir=scratch)
    return find_massive_channels(model, statistics, rung.massive_channels, names)


def _but_head(model: onnx_ir.Model, matmuls: Sequence[str]) -> tuple[str, ...]:
    """The MatMuls that read every token of a prompt; turning the head would store it twice for the last one."""
    return tuple(node.name or "" for node in model.graph if node.name in matmuls and part_of(weight_name(node)) != "head")


def switched_graph(rung: Rung, prepared: PreparedGraph, *, weights: WeightFormat, workdir: Path) -> SwitchedGraph:
    """The prepared graph with every MatMul switchable, in the rung's scheme; ``weights`` as for :func:`build_candidate`."""
    trips: RoundTrips
    if rung.scheme == "weight-only":
        trips = BlockwiseTrips(rung)
    elif rung.scheme == "per-token":
        trips = PerTokenTrips(weights)
    else:
        trips = EightBitTrips(prepared.ranges, weights, rung.per_channel)
    return SwitchedGraph(prepared.model, prepared.matmuls, trips, workdir=workdir)


def quantize_graph(
    rung: Rung, prepared: PreparedGraph, kept_float: Sequence[tuple[str, float]], *, weights: WeightFormat, folder: Path
) -> BuiltCandidate:
    """Write the prepared graph with all MatMuls but ``kept_float`` (names with their measured errors) quantized to ``folder``."""
    _check_known(rung, prepared)
    in_float = {name for name, _ in kept_float}
    stepwise = decoder_nodes(prepared.model) if rung.blockwise_decoder else frozenset()
    blockwise = [
        name for name in prepared.matmuls if name in rung.blockwise_matmuls or (name in stepwise and name not in in_float)
    ]
    left_out = in_float.union(blockwise)
    nodes = [name for name in prepared.matmuls if name not in left_out]
    if not nodes and prepared.matmuls:
        raise RecipeError(
            "every MatMul stays in float: nothing is left to quantize",
            where=f"quantize.ladder, {rung.name}: float_matmuls",
            hint="leave the rung out of the ladder, the float graph competes anyway",
        )
    if rung.scheme == "weight-only":
        path = _write_weight_only(rung, prepared, nodes, folder, weights=weights)
        return BuiltCandidate(path, tuple(nodes), tuple(kept_float), prepared.split)
    output = _write_integers(rung, prepared, nodes, folder, weights=weights)
    if blockwise:
        write_blocks(rung, output, blockwise, folder)
    return BuiltCandidate(output, (*nodes, *blockwise), tuple(kept_float), prepared.split)


def _write_integers(rung: Rung, prepared: PreparedGraph, nodes: Sequence[str], folder: Path, *, weights: WeightFormat) -> Path:
    """Of the schemes whose weights have one scale per channel, or one for all."""
    model = prepared.model.clone()
    if rung.scheme == "per-token":
        store_per_token(model, nodes, weights)
    elif prepared.ranges is None:
        store_dynamic(model, nodes, weights, per_channel=rung.per_channel)
    else:
        rounded, scratch = {}, folder / "scratch"
        if rung.method == "gptq":
            rounded = compensated_weights(model, nodes, prepared.batches, weights, workdir=scratch)
            shutil.rmtree(scratch, ignore_errors=True)
        store_static(
            model, nodes, prepared.ranges, weights, per_channel=rung.per_channel, portable=rung.portable, rounded=rounded
        )
        of_decoder = decoder_nodes(model)  # which onnxruntime runs
        if rung.eight_bit_convolutions:
            store_convolutions(model, prepared.ranges, weights, exclude=of_decoder)
        if rung.eight_bit_scores:
            unpack_projections(model, exclude=of_decoder)
            round_score_operands(model, prepared.ranges, exclude=of_decoder)
            spell_out_rounded(model, prepared.ranges, prepared.round_shares, exclude=of_decoder)
    if rung.quantize_embeddings:
        quantize_tables(model, rung)
        drop_unused(model)
    return save_compact(model, folder)


def _write_weight_only(rung: Rung, prepared: PreparedGraph, nodes: Sequence[str], folder: Path, *, weights: WeightFormat) -> Path:
    floating, scratch = prepared.model.clone(), folder / "scratch"
    scale_first(rung, floating, nodes, prepared.batches, workdir=scratch)
    model = floating.clone()
    in_channels, channels = _in_channels(rung, prepared, nodes), _channel_format(weights)
    if rung.weight_only_bits == 4:
        store_nearest(rung, model, [name for name in nodes if name in prepared.massive], (), channels)
    method = MOMENT_ROUNDINGS.get(rung.method)
    if method is not None:
        store_compensated(
            rung,
            model,
            _left_in_float(model, nodes),
            prepared.batches,
            workdir=scratch,
            method=method,
            in_channels=in_channels,
            massive=prepared.massive,
            weights=channels,
        )
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        store_nearest(rung, model, in_channels, in_channels, channels)
    if rung.prompt_graph:
        score_in_blocks(model)  # a single token is faster in blocks
    path = write_weight_only(rung, model, _left_in_float(model, nodes), folder, own_data_file=rung.prompt_graph)
    if rung.eight_bit_matmuls:
        exact = float_weights(floating, rung.eight_bit_matmuls)
        write_with_eight_bits(path, exact, rung, folder, own_data_file=rung.prompt_graph)
    if rung.prompt_graph:
        write_prompts(rung, replace(prepared, model=floating), nodes, path, weights=weights)
    return path


def write_prompts(rung: Rung, prepared: PreparedGraph, nodes: Sequence[str], graph: Path, *, weights: WeightFormat) -> None:
    """Write the graph for prompts beside one in which the named MatMuls are stored in blocks; arguments as for :func:`quantize_graph`.

    Args:
        rung: what was done.
        prepared: the float graph.
        nodes: names of the MatMuls.
        graph: with its weights in a file of their own.
        weights: how the target wants them stored.
    """
    read_norms, to_turn = ([name for name in nodes if name in known] for known in (prepared.in_channels, prepared.to_turn))
    # Both graphs read what has 8 bits in both; what one has in 4 the other has for itself.
    coarse = {*read_norms, *to_turn}.difference(_in_channels(rung, prepared, nodes)) if rung.weight_only_bits == 4 else ()
    write_prompt_graph(
        graph,
        read_norms,
        to_turn,
        _channel_format(weights),
        exact=float_weights(prepared.model, coarse),
        massive=prepared.massive,
        at_once=scores_at_once(prepared.model),
    )


def _in_channels(rung: Rung, prepared: PreparedGraph, nodes: Collection[str]) -> list[str]:
    """Those of the MatMuls whose weights in 8 bit serve both graphs."""
    return [
        node.name or ""
        for node in prepared.model.graph
        if node.name in nodes
        and node.name in prepared.in_channels
        and (rung.weight_only_bits == 8 or has_eight_bits(weight_name(node), rung.eight_bit))
    ]


def _channel_format(weights: WeightFormat) -> WeightFormat:
    return WeightFormat(sums_in_16_bits=weights.for_saturating_target)


def _left_in_float(model: onnx_ir.Model, nodes: Collection[str]) -> list[str]:
    return [node.name or "" for node in model.graph if node.name in nodes and node.op_type == "MatMul"]


def write_blocks(rung: Rung, graph: Path, names: Collection[str], folder: Path) -> Path:
    """Write a graph with the named MatMuls, which are in float, stored in blocks as the scheme ``weight-only`` does.

    Args:
        rung: its bits and block size.
        graph: quantized but for these MatMuls.
        names: of the MatMuls.
        folder: receives the graph; it may be the one that ``graph`` lies in.
    """
    model = load_graph(graph)
    store_in_blocks(rung, model, names)
    return save_compact(model, folder)


def _check_known(rung: Rung, prepared: PreparedGraph) -> None:
    for key in ("float_matmuls", "blockwise_matmuls", "outlier_matmuls", "eight_bit_matmuls"):
        unknown = set(getattr(rung, key)) - set(prepared.matmuls)
        if unknown:
            raise RecipeError(
                f"the graph has no MatMul {sorted(unknown)[0]!r}",
                where=f"quantize.ladder, {rung.name}: {key}",
                hint="the recipe was made for another model or with other library versions: search again with the original recipe",
            )
