"""When rungs of the ladder miss the accuracy gate: find the few MatMuls that must stay in float, and build that graph.

The ranking and the trials run on one graph with switches; only what the search found is built and examined for real. Each
finding goes into a journal, so that a search that was killed goes on where it stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.quant.build import prepare_graph, quantize_graph, switched_graph
from hfaccel.quant.calibration import STATISTICS_FOLDER, load_statistics
from hfaccel.quant.fallback import find_float_set
from hfaccel.quant.observed import CalibrationData, first_texts, gather_statistics
from hfaccel.quant.sensitivity import RANK_EACH_UP_TO, blocks_of, divergence, rank_by_sensitivity, ranking_deadline, squared_error
from hfaccel.rewrites.graphs import GRAPH_NAME, graph_bytes
from hfaccel.runtime.engines import open_graph
from hfaccel.stages.calibrate import calibration_batches, data_batches
from hfaccel.stages.candidates import FLOAT_PARENT, Candidate
from hfaccel.stages.choice import risk
from hfaccel.stages.journal import Journal
from hfaccel.stages.mixed import return_but_outliers, return_to_blocks
from hfaccel.stages.parents import ACCURACY_REASONS, FALLBACK_FOLDER, FALLBACK_SUFFIX, float_graphs
from hfaccel.stages.precision_map import places_of
from hfaccel.stages.race import timed_against

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.artifact.contract import Contract
    from hfaccel.quant.build import PreparedGraph
    from hfaccel.quant.calibration import ActivationStatistics, Feeds
    from hfaccel.quant.fallback import Fallback
    from hfaccel.quant.sensitivity import Distance
    from hfaccel.recipe.schema import GraphScope, Rung
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.examine import Examiner

CONFIRMATIONS = 3
"""How many more MatMuls go to float, one by one, where the kernels round a little worse than the switches said."""
RANKING_BATCHES = 2
"""Calibration batches, mostly of different lengths, whose first texts the ranking is measured on."""
TAKE_BACKS = 4
"""How many MatMuls a search that is made when needed tries to put back into 8 bit: each brings about 1 %, for 10 s to 90 s."""
WORTH_IT, CLEARLY_WORTH_IT = 1.05, 1.2
"""A rung is searched only if it was this much faster, all in 8 bit, than the best candidate that holds the gate.

The second figure is for a search that is made when needed, where a quantized candidate holds the gate already.
"""


def search_fallbacks(judged: Sequence[Candidate], parent: Artifact, examiner: Examiner, ctx: StageContext) -> Iterator[Candidate]:
    """Candidates with a few MatMuls in float, made of rungs that missed the gate, nearest miss first, until time is up.

    What misses by little needs few in float and is found soon; those after it are searched only where they could be faster.

    Args:
        judged: all candidates so far, with their reasons.
        parent: of the quantize stage: its float graph is what new candidates are timed against.
        examiner: of the accuracy gate.
        ctx: of the stage; graphs are written under ``ctx.workdir/fallback``.
    """
    settings = ctx.recipe.quantize
    left = [item for item in judged if item.reason is None and item.name != FLOAT_PARENT]
    # A float graph in another engine always holds the gate; that is no reason not to look for something faster in 8 bit.
    content = settings.fallback == "needed" and any(item.quantized for item in left)
    if settings.fallback == "off" or (content and not ctx.on_target):
        return
    worth_it = CLEARLY_WORTH_IT if content else WORTH_IT
    best, deadline = max((item.speedup for item in left), default=0.0), time.monotonic() + settings.search_seconds
    rungs = {rung.name: rung for rung in settings.ladder if rung.scheme != "none"}
    missed = [item for item in judged if item.reason in ACCURACY_REASONS and item.name in rungs]
    batches = calibration_batches(ctx)
    statistics: dict[GraphScope, Mapping[str, ActivationStatistics]] = {}
    for item in sorted(missed, key=risk):
        rung = rungs[item.name]
        if time.monotonic() > deadline:
            break
        if ctx.on_target and item.speedup < best * worth_it:
            continue
        if batches and rung.needs_statistics and rung.graph not in statistics:
            statistics[rung.graph] = _statistics(rung.graph, batches, parent, ctx)
        # Without calibration texts, those of the data serve for the ranking (their labels are not looked at).
        texts = batches or data_batches(examiner.dataset, ctx)
        calibration = CalibrationData(texts, statistics.get(rung.graph, {}))
        for made in _search(item, rung, calibration, parent, examiner, deadline, ctx):
            yield made
            best = max(best, made.speedup if made.reason is None else 0.0)


def _search(
    missed: Candidate,
    rung: Rung,
    calibration: CalibrationData,
    parent: Artifact,
    examiner: Examiner,
    deadline: float,
    ctx: StageContext,
) -> Iterator[Candidate]:
    weights = ctx.recipe.quantize.weights
    name, scratch = missed.name + FALLBACK_SUFFIX, ctx.workdir / "scratch"
    candidate = replace(missed, name=name, graph="", timings=(), speedup=1.0, verdict=None, reason=None, detail="")
    prepared = prepare_graph(rung, float_graphs(ctx)[rung.graph].graph_path, calibration, scratch=scratch)
    switched = switched_graph(rung, prepared, weights=weights, workdir=scratch)
    journal = Journal(ctx.journal, rung.quantization().model_dump_json())  # rungs that quantize alike share their findings
    blocks = _blocks(rung, prepared, ctx)
    by_block = f", in {len(blocks)} blocks first" if len(blocks) < len(prepared.matmuls) else ""
    ctx.progress.step(f"ranking the {len(prepared.matmuls)} MatMuls of {missed.name} by sensitivity{by_block}")
    rank_until = ranking_deadline(deadline)
    ranking = rank_by_sensitivity(
        switched,
        first_texts(calibration.batches[:RANKING_BATCHES]),
        blocks=blocks,
        distance=_distance(ctx.artifacts["export"].contract),
        ledger=journal,
        out_of_time=lambda: time.monotonic() > rank_until,
    )
    if time.monotonic() > rank_until:
        ctx.progress.step(f"half of the search's time is spent: the MatMuls of {missed.name} are ranked by what was measured")
    errors = dict(ranking)

    def holds(kept_float: frozenset[str], error_share: float) -> bool:
        known = journal.known_trial(kept_float)
        if known is None:
            switched.switch_on([matmul for matmul in prepared.matmuls if matmul not in kept_float])
            finding = examiner.examine(switched, error_share=error_share)
            known = finding.reason is None
            journal.add_trial(kept_float, known)
            outcome = "holds" if known else finding.detail
            ctx.progress.step(f"{missed.name} with {len(kept_float)} MatMuls in float: {outcome}")
        return known

    most_take_backs = None if ctx.recipe.quantize.fallback == "thorough" else TAKE_BACKS
    found = find_float_set(list(errors), holds, lambda: time.monotonic() > deadline, most_take_backs=most_take_backs)
    if found is None:
        shutil.rmtree(scratch, ignore_errors=True)
        yield replace(
            candidate, reason="no-float-set-found", detail=f"no set of MatMuls in float held the gate (tried: {journal.trials})"
        )
        return
    fallback = _confirmed(candidate, rung, prepared, found, errors, examiner, ctx)
    shutil.rmtree(scratch, ignore_errors=True)
    yield timed_against(parent, fallback, ctx)
    if fallback.reason is not None or not fallback.kept_float or rung.scheme == "weight-only" or time.monotonic() > deadline:
        return
    yield timed_against(parent, return_to_blocks(fallback, rung, examiner, found.error_share, ctx), ctx)
    if ctx.calibration and time.monotonic() < deadline:  # without, the recipe could not repeat it
        seen = calibration.statistics or _statistics(rung.graph, calibration.batches, parent, ctx)
        calibration = replace(calibration, statistics=seen)
        split = return_but_outliers(fallback, rung, calibration, examiner, found.error_share, ctx)
        if split is not None:
            yield timed_against(parent, split, ctx)


def _confirmed(
    candidate: Candidate,
    rung: Rung,
    prepared: PreparedGraph,
    found: Fallback,
    errors: Mapping[str, float],
    examiner: Examiner,
    ctx: StageContext,
) -> Candidate:
    """The candidate as it was found, built and examined, with a few more MatMuls in float where the built graph asks for them."""
    kept = list(found.kept_float)
    spare = [matmul for matmul in errors if matmul not in kept]
    folder = ctx.workdir / FALLBACK_FOLDER / candidate.name
    for _ in range(CONFIRMATIONS + 1):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kept_float = [(matmul, errors[matmul]) for matmul in kept]
        built = quantize_graph(rung, prepared, kept_float, weights=ctx.recipe.quantize.weights, folder=folder)
        finding = examiner.examine(open_graph(built.path, candidate.session), error_share=found.error_share)
        if finding.reason is None or len(spare) <= 1:  # with none in 8 bit it would be the float graph
            break
        kept.append(spare.pop(0))
    return replace(
        candidate,
        graph=f"{FALLBACK_FOLDER}/{candidate.name}/{GRAPH_NAME}",
        size_bytes=graph_bytes(folder),
        quantized=len(built.quantized),
        kept_float=built.kept_float,
        verdict=finding.to_json(),
        reason=finding.reason,
        detail=finding.detail,
    )


def _statistics(
    scope: GraphScope, batches: Sequence[Feeds], parent: Artifact, ctx: StageContext
) -> Mapping[str, ActivationStatistics]:
    """Of the activations of a float graph; those that the quantize stage has gathered, where it left them in its artifact."""
    gathered = parent.folder / STATISTICS_FOLDER / f"{scope}.npz"
    if gathered.is_file():
        return load_statistics(gathered)
    return gather_statistics(float_graphs(ctx)[scope].graph_path, batches, ctx.workdir / "scratch")


def _blocks(rung: Rung, prepared: PreparedGraph, ctx: StageContext) -> list[tuple[str, ...]]:
    """What the ranking measures as a whole first: the layers, where the graph is large."""
    layers: dict[str, int | None] = {}
    if len(prepared.matmuls) > RANK_EACH_UP_TO:
        layers = {place.name: place.layer for place in places_of(float_graphs(ctx)[rung.graph], ctx)}
    return blocks_of(prepared.matmuls, layers)


def _distance(contract: Contract) -> Distance:
    """How far answers have moved: as probabilities where they are logits of one label out of several."""
    chosen_label = contract.task in ("token-classification", "fill-mask") or (
        contract.task == "text-classification" and contract.problem_type == "single_label_classification"
    )
    return divergence if chosen_label else squared_error
