"""When rungs of the ladder miss the accuracy gate: find the few MatMuls that must stay in float, and build that graph.

Trials run on one graph with switches; only what the search found is built and examined for real. Each trial goes into a journal,
so that a search that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.artifact.contract import SessionSettings
from hfaccel.quant.build import (
    CalibrationData,
    first_texts,
    gather_statistics,
    prepare_graph,
    quantize_graph,
    switched_graph,
)
from hfaccel.quant.fallback import find_float_set
from hfaccel.quant.sensitivity import rank_by_sensitivity
from hfaccel.rewrites.graphs import GRAPH_NAME, graph_bytes
from hfaccel.runtime.engines import open_graph
from hfaccel.stages.calibrate import calibration_batches, data_batches
from hfaccel.stages.candidates import FLOAT_PARENT, Candidate
from hfaccel.stages.parents import FALLBACK_SUFFIX, float_graphs
from hfaccel.stages.race import Entrant, race, with_timings

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.recipe.schema import GraphScope, Rung
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.examine import Examiner

ACCURACY_REASONS = (
    "loss-over-budget",
    "cosine-under-minimum",
    "agreement-under-minimum",
    "slice-loss-over-budget",
    "batch-variant",
)
CONFIRMATIONS = 3
"""How many more MatMuls go to float, one by one, where the kernels round a little worse than the switches said."""
WORTH_IT = 1.05
"""A rung is searched only if it was this much faster, all in 8 bit, than the best candidate that holds the gate."""


def search_fallbacks(judged: Sequence[Candidate], parent: Artifact, examiner: Examiner, ctx: StageContext) -> Iterator[Candidate]:
    """Candidates with a few MatMuls in float, made of rungs that missed the gate, fastest rung first, until time is up.

    Args:
        judged: all candidates so far, with their reasons.
        parent: of the quantize stage: its float graph is what new candidates are timed against.
        examiner: of the accuracy gate.
        ctx: of the stage; graphs are written under ``ctx.workdir/fallback``.
    """
    settings = ctx.recipe.quantize
    left = [item for item in judged if item.reason is None and item.name != FLOAT_PARENT]
    holding = [item.speedup for item in left]
    # A float graph in another engine always holds the gate; that is no reason not to look for something faster in 8 bit.
    if settings.fallback == "off" or (settings.fallback == "needed" and any(item.precision == "int8" for item in left)):
        return
    best, deadline = max(holding, default=0.0), time.monotonic() + settings.search_seconds
    rungs = {rung.name: rung for rung in settings.ladder if rung.scheme != "none"}
    missed = [item for item in judged if item.reason in ACCURACY_REASONS and item.name in rungs]
    calibrations: dict[GraphScope, CalibrationData] = {}
    for item in sorted(missed, key=lambda candidate: -candidate.speedup):
        rung = rungs[item.name]
        if time.monotonic() > deadline or (ctx.on_target and item.speedup < best * WORTH_IT):
            break
        if rung.graph not in calibrations:
            calibrations[rung.graph] = _calibration(rung, examiner, ctx)
        made = _search(item, rung, calibrations[rung.graph], parent, examiner, deadline, ctx)
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
) -> Candidate:
    weight_bits = ctx.recipe.quantize.weight_bits
    name, scratch = missed.name + FALLBACK_SUFFIX, ctx.workdir / "scratch"
    candidate = replace(missed, name=name, graph="", timings=(), speedup=1.0, verdict=None, reason=None, detail="")
    prepared = prepare_graph(rung, float_graphs(ctx)[rung.graph].graph_path, calibration, scratch=scratch)
    switched = switched_graph(rung, prepared, weight_bits=weight_bits, workdir=scratch)
    ctx.progress.step(f"ranking the {len(prepared.matmuls)} MatMuls of {missed.name} by sensitivity")
    errors = dict(rank_by_sensitivity(switched, first_texts(calibration.batches)))
    journal = Journal(ctx.journal, rung.quantization().model_dump_json())  # rungs that quantize alike share their trials

    def holds(kept_float: frozenset[str]) -> bool:
        known = journal.known(kept_float)
        if known is None:
            switched.switch_on([matmul for matmul in prepared.matmuls if matmul not in kept_float])
            finding = examiner.examine(switched)
            known = finding.reason is None
            journal.add(kept_float, known)
            outcome = "holds" if known else finding.detail
            ctx.progress.step(f"{missed.name} with {len(kept_float)} MatMuls in float: {outcome}")
        return known

    found = find_float_set(list(errors), holds, lambda: time.monotonic() > deadline)
    if found is None:
        shutil.rmtree(scratch, ignore_errors=True)
        return replace(candidate, reason="no-float-set-found", detail=f"no set held the gate in {len(journal)} trials")
    kept = list(found.kept_float)
    spare = [matmul for matmul in errors if matmul not in kept]
    for _ in range(CONFIRMATIONS + 1):
        folder = ctx.workdir / "fallback" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        built = quantize_graph(rung, prepared, [(item, errors[item]) for item in kept], weight_bits=weight_bits, folder=folder)
        finding = examiner.examine(open_graph(built.path, missed.session))
        if finding.reason is None or not spare:
            break
        kept.append(spare.pop(0))
    shutil.rmtree(scratch, ignore_errors=True)
    candidate = replace(
        candidate,
        graph=f"fallback/{name}/{GRAPH_NAME}",
        size_bytes=graph_bytes(folder),
        quantized=len(built.quantized),
        kept_float=built.kept_float,
        verdict=finding.to_json(),
        reason=finding.reason,
        detail=finding.detail,
    )
    return _timed(candidate, parent, folder, ctx) if finding.reason is None else candidate


def _timed(candidate: Candidate, parent: Artifact, folder: Path, ctx: StageContext) -> Candidate:
    """The candidate with its speed against the float graph; off the target nothing is timed."""
    if not ctx.on_target:
        return candidate
    floating = Entrant(parent.graph_path, SessionSettings(), graph_bytes(parent.folder))
    entrant = Entrant(folder / GRAPH_NAME, candidate.session, candidate.size_bytes)
    return with_timings(candidate, race({FLOAT_PARENT: floating}, {candidate.name: entrant}, ctx).timings[candidate.name])


def _calibration(rung: Rung, examiner: Examiner, ctx: StageContext) -> CalibrationData:
    """Of the calibration texts; without any, texts of the data serve for the ranking (their labels are not looked at)."""
    batches = calibration_batches(ctx)
    if not batches:
        return CalibrationData(data_batches(examiner.dataset, ctx), {})
    statistics = gather_statistics(float_graphs(ctx)[rung.graph].graph_path, batches, ctx.workdir / "scratch")
    return CalibrationData(batches, statistics)


class Journal:
    """Trials of a rung, one JSON line each, kept until the stage has finished.

    Args:
        path: the file; it may exist already, from a run that was killed. None keeps nothing.
        rung: whose trials these are; the quantization part of a rung, so that engines share them.
    """

    def __init__(self, path: Path | None, rung: str) -> None:
        self._path = path
        self._rung = rung
        self._known: dict[frozenset[str], bool] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["rung"] == rung:
                    self._known[frozenset(entry["float"])] = bool(entry["holds"])
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut

    def __len__(self) -> int:
        return len(self._known)

    def known(self, kept_float: frozenset[str]) -> bool | None:
        """The outcome of a trial made before, or None."""
        return self._known.get(kept_float)

    def add(self, kept_float: frozenset[str], holds: bool) -> None:
        """Write down a trial at once."""
        self._known[kept_float] = holds
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"rung": self._rung, "float": sorted(kept_float), "holds": holds}) + "\n")
