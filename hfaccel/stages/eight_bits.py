"""What of a decoder needs 8 bits where the rest has 4: found by what the rounding of each MatMul does to the answers.

A rung of 4 bit names whole parts that have 8 (``eight_bit``), which is a guess. The search starts with everything in 4 bit, measures
how far each MatMul's rounding alone moves the next token's distribution, and gives 8 bits to those that move it most for their
bytes. Divergences of single MatMuls add up, and their sum is about what perplexity rises by: so the sets to try are known before
the gate has seen any of them. They are tried from the safe side, and the first one that misses the gate ends the search: with
an order fixed beforehand each trial may err as often as a single one (fixed sequence, Maurer, Hothorn and Lehmacher 1995).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.build import PreparedGraph, cache_bits, prepare_graph, quantize_graph, write_prompts
from hfaccel.quant.more_bits import StoredTrips, float_weights, write_with_eight_bits
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.quantize_cache import cache_scales, store_cache
from hfaccel.quant.sensitivity import divergence, rank_by_sensitivity, ranking_deadline
from hfaccel.quant.switches import SwitchedGraph
from hfaccel.rewrites.graphs import GRAPH_NAME, graph_bytes, load_graph
from hfaccel.rewrites.last_token_logits import all_token_logits
from hfaccel.stages.calibrate import calibration_batches
from hfaccel.stages.choice import risk
from hfaccel.stages.journal import Journal
from hfaccel.stages.parents import ACCURACY_REASONS, FALLBACK_FOLDER, MIXED_SUFFIX, float_graphs
from hfaccel.stages.race import timed_against

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.artifact import Artifact
    from hfaccel.quant.calibration import Feeds
    from hfaccel.recipe.schema import Rung
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate
    from hfaccel.stages.examine_language import LanguageExaminer

BUDGET_SHARES = (0.25, 0.5, 0.75, 1.0, 1.3, 1.6, 2.0, 2.5)
"""What the MatMuls in 4 bit may lose together, by the sum of their divergences, as a share of the accuracy budget."""
TEXTS, TOKENS, EVERY = 4, 96, 3
"""Calibration texts that sensitivity is measured on, tokens of each, and of how many tokens one is looked at."""


def search_eight_bits(
    judged: Sequence[Candidate], parent: Artifact, examiner: LanguageExaminer, ctx: StageContext
) -> Iterator[Candidate]:
    """Candidates in 4 bit with a measured set of MatMuls in 8 bit, one for each rung that has 4 bits and room for it.

    Args:
        judged: all candidates so far, with their reasons.
        parent: of the quantize stage: its float graph is what new candidates are timed against.
        examiner: of the accuracy gate.
        ctx: of the stage; graphs are written under ``ctx.workdir/fallback``.
    """
    settings = ctx.recipe.quantize
    holds = any(item.reason is None and item.quantized for item in judged)
    if settings.fallback == "off" or (settings.fallback == "needed" and holds):
        return
    batches = calibration_batches(ctx)
    if not batches:
        return
    deadline = time.monotonic() + settings.search_seconds
    rungs = {rung.name: rung for rung in settings.ladder if _is_searched(rung)}
    built = [item for item in judged if item.name in rungs and item.reason in (None, *ACCURACY_REASONS)]
    for item in sorted(built, key=risk):
        if time.monotonic() > deadline:
            return
        yield _search(item, rungs[item.name], batches, parent, examiner, deadline, ctx)


def _is_searched(rung: Rung) -> bool:
    """Whether it has 4 bits and nothing beside that a search would leave out; methods that scale activations change the float weights."""
    four_bits = rung.scheme == "weight-only" and rung.weight_only_bits == 4
    plain = not rung.eight_bit_matmuls and not rung.keep_float and rung.cache_bits in (None, "auto")
    return four_bits and plain and not rung.method.startswith("awq")


@dataclass(frozen=True)
class _InFourBits:
    """A rung with everything in 4 bit.

    Attributes:
        rung: without parts in 8 bit.
        prepared: its float graph.
        graph: on disk.
        names: of the MatMuls in 4 bit.
        cache_scales: of keys and values in 8 bit, which only the trials have; None: they stay in float.
    """

    rung: Rung
    prepared: PreparedGraph
    graph: Path
    names: tuple[str, ...]
    cache_scales: Mapping[str, np.ndarray] | None


def _search(
    start: Candidate,
    rung: Rung,
    batches: Sequence[Feeds],
    parent: Artifact,
    examiner: LanguageExaminer,
    deadline: float,
    ctx: StageContext,
) -> Candidate:
    name = start.name + MIXED_SUFFIX
    best = replace(start, name=name, graph="", size_bytes=0, timings=(), speedup=1.0, verdict=None, reason=None, detail="")
    folder, trial_folder = ctx.workdir / FALLBACK_FOLDER / name, ctx.workdir / FALLBACK_FOLDER / "trial"
    ctx.progress.step(f"{name}: rounding every MatMul to 4 bit")
    four = _in_four_bits(rung, batches, ctx)
    journal = Journal(ctx.journal, four.rung.quantization().model_dump_json())
    errors = _errors(four, batches, deadline, journal, ctx)
    ordered = sets_in_order(errors, _bytes_saved(four), ctx.recipe.accuracy.max_loss)
    # With all of them in 8 bit nothing would be left in 4: that is another rung.
    sets = [eight for eight in ordered if len(eight) < len(four.names)]
    for eight in left_to_try(sets, journal.known_trial):
        if time.monotonic() > deadline:
            break
        trial = _tried(best, four, {matmul: errors[matmul] for matmul in eight}, trial_folder, examiner, ctx)
        outcome = "holds" if trial.reason is None else trial.detail
        ctx.progress.step(f"{name} with {len(eight)} of {len(four.names)} MatMuls in 8 bit: {outcome}")
        journal.add_trial(frozenset(eight), trial.reason is None)
        if trial.reason is not None:
            break
        shutil.rmtree(folder, ignore_errors=True)
        trial_folder.rename(folder)
        best = replace(trial, graph=f"{FALLBACK_FOLDER}/{name}/{GRAPH_NAME}")
    shutil.rmtree(trial_folder, ignore_errors=True)
    shutil.rmtree(ctx.workdir / "scratch", ignore_errors=True)
    if not best.graph:
        detail = f"no set of MatMuls in 8 bit held the gate in {journal.trials} trials"
        return replace(best, reason="no-float-set-found", detail=detail)
    return timed_against(parent, best, ctx)


def _in_four_bits(rung: Rung, batches: Sequence[Feeds], ctx: StageContext) -> _InFourBits:
    free, scratch = rung.model_copy(update={"eight_bit": ()}), ctx.workdir / "scratch"
    floating = float_graphs(ctx)[rung.graph].graph_path
    prepared = prepare_graph(free, floating, CalibrationData(batches, {}), scratch=scratch)
    folder = scratch / "four"
    folder.mkdir(parents=True, exist_ok=True)
    kept_float = tuple((matmul, 0.0) for matmul in rung.float_matmuls)
    built = quantize_graph(free, prepared, kept_float, weights=ctx.recipe.quantize.weights, folder=folder)
    scales = None if cache_bits(rung, floating) is None else cache_scales(floating, batches, 8)
    return _InFourBits(free, prepared, built.path, built.quantized, scales)


def _errors(
    four: _InFourBits, batches: Sequence[Feeds], deadline: float, journal: Journal, ctx: StageContext
) -> dict[str, float]:
    """Divergence of the next token's distribution when only the named MatMul is rounded, by name."""
    stored = {node.name or "": node for node in load_graph(four.graph).graph if node.name in four.names}
    floating = four.prepared.model.clone()
    all_token_logits(floating)
    switched = _SomeLogits(SwitchedGraph(floating, four.names, StoredTrips(stored), workdir=ctx.workdir / "scratch"))
    ctx.progress.step(f"measuring what the rounding of each of {len(four.names)} MatMuls does to the answers")
    until = ranking_deadline(deadline)
    ranking = rank_by_sensitivity(
        switched,
        [_beginning(batches[0])],
        blocks=[(name,) for name in four.names],
        distance=divergence,
        ledger=journal,
        out_of_time=lambda: time.monotonic() > until,
    )
    return dict(ranking)


class _SomeLogits:
    """A switched decoder that gives nothing but the logits of some of its tokens, [tokens, vocabulary]."""

    def __init__(self, graph: SwitchedGraph) -> None:
        self.names = graph.names
        self.switch_on = graph.switch_on
        self._graph = graph

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`hfaccel.quant.switches.SwitchedGraph.run`."""
        text = feeds["attention_mask"].astype(bool)
        return {"logits": self._graph.run(feeds)["logits"][text][::EVERY]}


def _beginning(feeds: Feeds) -> Feeds:
    """The first tokens of the first texts of a batch."""
    width = feeds["input_ids"].shape[1]
    return {
        name: np.ascontiguousarray(array[:TEXTS, :TOKENS] if array.ndim == 2 and array.shape[1] == width else array[:TEXTS])
        for name, array in feeds.items()
    }


def _bytes_saved(four: _InFourBits) -> dict[str, int]:
    """What 4 bits save of 8, by name of the MatMul."""
    return {name: weight.size // 2 for name, weight in float_weights(four.prepared.model, four.names).items()}


def sets_in_order(errors: Mapping[str, float], bytes_saved: Mapping[str, int], max_loss: float) -> list[tuple[str, ...]]:
    """Sets of MatMuls to give 8 bits, the largest first; each has those that move the answers most for the bytes they save.

    Args:
        errors: divergence (nats) when only this one has 4 bits, by name.
        bytes_saved: by its 4 bits.
        max_loss: the accuracy budget, relative perplexity.
    """
    order = sorted(errors, key=lambda name: -errors[name] / bytes_saved[name])
    left = np.append(np.cumsum([errors[name] for name in order][::-1])[::-1], 0.0)
    counts = [int(np.argmax(left <= share * math.log1p(max_loss))) for share in BUDGET_SHARES]
    return [tuple(order[:count]) for count in dict.fromkeys(counts)]


def left_to_try(sets: Sequence[tuple[str, ...]], known: Callable[[frozenset[str]], bool | None]) -> Sequence[tuple[str, ...]]:
    """Of sets in order those that a search which was killed must still try: from the last that held, whose graph is gone, to the first that missed.

    Args:
        sets: in the order of their trials.
        known: whether a set held, None if it was not tried.
    """
    outcomes = [known(frozenset(names)) for names in sets]
    first = max((place for place, held in enumerate(outcomes) if held), default=0)
    end = next((place for place, held in enumerate(outcomes) if held is False), len(sets))
    return sets[first:end]


def _tried(
    candidate: Candidate,
    four: _InFourBits,
    eight: Mapping[str, float],
    folder: Path,
    examiner: LanguageExaminer,
    ctx: StageContext,
) -> Candidate:
    """The candidate with these MatMuls (and their divergences) in 8 bit, written to ``folder`` and judged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    exact = float_weights(four.prepared.model, eight)
    path = write_with_eight_bits(four.graph, exact, four.rung, folder, own_data_file=four.rung.prompt_graph)
    if four.rung.prompt_graph:
        write_prompts(four.rung, four.prepared, four.names, path, weights=ctx.recipe.quantize.weights)
    if four.cache_scales is not None:
        store_cache(path, four.cache_scales, 8)
    finding = examiner.examine_candidate(candidate, path, ctx.artifacts["export"].contract, ctx)
    return replace(
        candidate,
        size_bytes=graph_bytes(folder),
        quantized=len(four.names),
        eight_bit=tuple(eight.items()),
        verdict=finding.to_json(),
        reason=finding.reason,
        detail=finding.detail,
    )
