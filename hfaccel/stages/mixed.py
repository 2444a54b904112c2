"""After the search for a float set: what of it can do with less than float, and still holds the gate.

In blocks of 8 bit (the scheme ``weight-only``), where each token and block has a scale of its own; or in 8 bit like the others but for the
channels that stand out (:mod:`hfaccel.quant.float_channels`). Both keep most of float's accuracy and cost less time. What results are
candidates of their own beside the one with the set in float; the final race decides.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.quant.build import prepare_graph, quantize_graph, write_blocks
from hfaccel.rewrites.graphs import GRAPH_NAME, graph_bytes
from hfaccel.runtime.engines import open_graph
from hfaccel.stages.parents import FALLBACK_FOLDER, FALLBACK_SUFFIX, MIXED_SUFFIX, OUTLIERS_SUFFIX, float_graphs

if TYPE_CHECKING:
    from hfaccel.quant.build import PreparedGraph
    from hfaccel.quant.observed import CalibrationData
    from hfaccel.recipe.schema import Rung
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate
    from hfaccel.stages.examine import Examiner

    Build = Callable[[Sequence[tuple[str, float]], Sequence[str], Path], Path]
    """Writes the graph with MatMuls in float (names with their errors) and others in the other way to a folder."""

TRIALS = 3
WAYS = 2
"""Which share the error that the search may make."""


@dataclass(frozen=True)
class _Way:
    """How MatMuls of a float set may leave it: end of the candidate's name, its words, those that may, worst first, and what builds it."""

    suffix: str
    told: str
    names: Sequence[str]
    build: Build


def return_to_blocks(fallback: Candidate, rung: Rung, examiner: Examiner, error_share: float, ctx: StageContext) -> Candidate:
    """The candidate with as much of its float set in blocks as holds the gate, or with the reason why none does.

    Args:
        fallback: holds the gate with its ``kept_float``, which is not empty.
        rung: of a scheme other than weight-only, that ``fallback`` was made of.
        examiner: of the accuracy gate.
        error_share: how much of the 5 % the search's trials may err with.
        ctx: of the stage, which ``fallback``'s graph lies under.
    """
    floating = ctx.workdir / fallback.graph

    def build(_kept: Sequence[tuple[str, float]], others: Sequence[str], folder: Path) -> Path:
        return write_blocks(rung, floating, others, folder)

    way = _Way(MIXED_SUFFIX, "in blocks of 8 bit", [name for name, _ in fallback.kept_float], build)
    tried, others = _most_that_holds(fallback, way, examiner, error_share, ctx)
    return replace(tried, blockwise=others)


def return_but_outliers(
    fallback: Candidate, rung: Rung, calibration: CalibrationData, examiner: Examiner, error_share: float, ctx: StageContext
) -> Candidate | None:
    """The candidate with as much of its float set in 8 bit, but for the channels that stand out, as holds the gate, or with the reason.

    None where no channels of what these MatMuls read stand out. Arguments as for :func:`return_to_blocks`, and the calibration texts with
    statistics of the float graph.
    """
    graph, names = float_graphs(ctx)[rung.graph].graph_path, tuple(name for name, _ in fallback.kept_float)

    def prepared(others: Sequence[str]) -> PreparedGraph:
        scratch = ctx.workdir / "scratch"
        made = prepare_graph(rung.model_copy(update={"outlier_matmuls": tuple(others)}), graph, calibration, scratch=scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        return made

    all_split = prepared(names)  # as with those alone that have such channels: the others are left as they are
    may_leave = [name for name in names if name in all_split.channelwise]

    def build(kept: Sequence[tuple[str, float]], others: Sequence[str], folder: Path) -> Path:
        split = all_split if len(others) == len(may_leave) else prepared(others)
        return quantize_graph(rung, split, kept, weights=ctx.recipe.quantize.weights, folder=folder).path

    way = _Way(OUTLIERS_SUFFIX, "in 8 bit but for outlier channels", may_leave, build)
    if not way.names:
        return None
    tried, others = _most_that_holds(fallback, way, examiner, error_share, ctx)
    return replace(tried, channelwise=others)


def _most_that_holds(
    fallback: Candidate, way: _Way, examiner: Examiner, error_share: float, ctx: StageContext
) -> tuple[Candidate, tuple[str, ...]]:
    """The candidate with the most MatMuls that leave its float set and hold the gate, and which they are; else the last one tried.

    Tried are all, then all without the more sensitive half, and so on; the trials of all ways share one verdict's error.
    """
    name = fallback.name.removesuffix(FALLBACK_SUFFIX) + way.suffix
    folder = ctx.workdir / FALLBACK_FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    counts = list(_halves(len(way.names)))
    tried, others = fallback, tuple[str, ...]()
    for count in counts:
        others = tuple(way.names[count:])
        kept = tuple((matmul, error) for matmul, error in fallback.kept_float if matmul not in others)
        path = way.build(kept, others, folder)
        finding = examiner.examine(open_graph(path, fallback.session), error_share=error_share / (WAYS * len(counts)))
        outcome = "holds" if finding.reason is None else finding.detail
        ctx.progress.step(f"{fallback.name} with {len(others)} of its float MatMuls {way.told}: {outcome}")
        tried = replace(
            fallback,
            name=name,
            graph=f"{FALLBACK_FOLDER}/{name}/{GRAPH_NAME}",
            size_bytes=graph_bytes(folder),
            quantized=fallback.quantized + len(others),
            kept_float=kept,
            timings=(),
            speedup=1.0,
            verdict=finding.to_json(),
            reason=finding.reason,
            detail=finding.detail,
        )
        if finding.reason is None:
            break
    return tried, others


def _halves(count: int) -> Iterator[int]:
    """How many of the set stay in float: none, half, three quarters; always fewer than all."""
    tried = set()
    for trial in range(TRIALS):
        left = count - (count >> trial)
        if left < count and left not in tried:
            tried.add(left)
            yield left
