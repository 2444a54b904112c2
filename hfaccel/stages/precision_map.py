"""Which precision each MatMul of the shipped graph has, by layer and role: for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.quant.layers import HEAD_PARTS, MatMulPlace, matmul_places
from hfaccel.rewrites.graphs import load_graph
from hfaccel.rewrites.pack_projections import PACKED_SUFFIX
from hfaccel.stages.candidates import Candidate, MatMulPrecision
from hfaccel.stages.export import PARAMETERS_FILE
from hfaccel.stages.parents import float_graphs, rung_as_found

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.artifact import Artifact
    from hfaccel.artifact.contract import Precision
    from hfaccel.stages.base import StageContext


def precision_map(chosen: Candidate, path: Path, ctx: StageContext) -> tuple[MatMulPrecision, ...]:
    """The MatMuls of the float graph that a candidate was made from, each with its precision in the candidate.

    Args:
        chosen: the candidate.
        path: its graph, which says how many bits weights in blocks have.
        ctx: of the stage.
    """
    rest: Precision = "bf16" if chosen.session.inference_precision == "bf16" else "fp32"
    kept = {name for name, _ in chosen.kept_float}
    rung, graphs = rung_as_found(chosen, ctx.recipe.quantize.ladder), float_graphs(ctx)
    scope = rung.graph if rung is not None and rung.graph in graphs else "optimized"
    lowered: Precision = chosen.precision if chosen.precision in ("int8", "int4") else rest
    bits = {node.name: node.attributes.get_int("bits", 4) for node in load_graph(path).graph if node.op_type == "MatMulNBits"}

    def parts(place: MatMulPlace) -> list[str]:
        return [name for name in (place.name + suffix for suffix in HEAD_PARTS) if name in bits] or [place.name]

    def precision(name: str) -> Precision:
        if name in kept:
            return rest
        return "int8" if bits.get(name) == 8 else lowered

    return tuple(
        MatMulPrecision(name, place.layer, place.role, precision(name))
        for place in places_of(graphs[scope], ctx)
        for name in parts(place)
    )


def places_of(graph: Artifact, ctx: StageContext) -> tuple[MatMulPlace, ...]:
    """Where each quantizable MatMul of a float graph belongs.

    Rewrites may change weights, which are then not those of the checkpoint any more; but they keep the names of MatMuls, and in
    the exported graph the weights are as they were.
    """
    exported = ctx.artifacts["export"]
    digests = json.loads((exported.folder / PARAMETERS_FILE).read_text(encoding="utf-8"))
    known = {place.name: place for place in matmul_places(load_graph(exported.graph_path), digests) if place.layer is not None}
    return tuple(_placed(place, known) for place in matmul_places(load_graph(graph.graph_path), digests))


def _placed(place: MatMulPlace, known: Mapping[str, MatMulPlace]) -> MatMulPlace:
    first = known.get(place.name.removesuffix(PACKED_SUFFIX))
    if first is None or not place.name.endswith(PACKED_SUFFIX):
        return known.get(place.name, place)
    return replace(first, name=place.name, role="query, key, value" if first.role == "query" else first.role)
