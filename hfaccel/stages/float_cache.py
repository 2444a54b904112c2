"""When a rung misses the accuracy gate with keys and values in 8 bit: the same rung with a cache in float, judged again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.quant.build import build_candidate, cache_bits
from hfaccel.quant.observed import CalibrationData
from hfaccel.rewrites.graphs import GRAPH_NAME, graph_bytes
from hfaccel.stages.calibrate import calibration_batches
from hfaccel.stages.parents import ACCURACY_REASONS, FALLBACK_FOLDER, FLOAT_CACHE_SUFFIX, float_graphs
from hfaccel.stages.race import timed_against

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate
    from hfaccel.stages.examine_language import LanguageExaminer


def with_float_cache(
    judged: Sequence[Candidate], parent: Artifact, examiner: LanguageExaminer, ctx: StageContext
) -> Iterator[Candidate]:
    """Candidates of rungs of 8 bit that leave the cache to hfaccel (``cache_bits: auto``) and missed the gate.

    Those of 4 bit miss it for their weights, which is what :func:`hfaccel.stages.eight_bits.search_eight_bits` mends; arguments as there.
    """
    rungs = {rung.name: rung for rung in ctx.recipe.quantize.ladder if rung.cache_bits == "auto" and rung.precision == "int8"}
    for missed in judged:
        if missed.reason not in ACCURACY_REASONS or missed.name not in rungs:
            continue
        rung = rungs[missed.name]
        graph = float_graphs(ctx)[rung.graph].graph_path
        if cache_bits(rung, graph) is None:
            continue  # it had one already
        name = missed.name + FLOAT_CACHE_SUFFIX
        ctx.progress.step(f"{missed.name} misses the accuracy gate: once more with keys and values in float")
        folder = ctx.workdir / FALLBACK_FOLDER / name
        folder.mkdir(parents=True)
        calibration = CalibrationData(calibration_batches(ctx), {})
        floating = rung.model_copy(update={"cache_bits": None})
        built = build_candidate(floating, graph, calibration, weights=ctx.recipe.quantize.weights, folder=folder)
        candidate = replace(missed, name=name, graph=f"{FALLBACK_FOLDER}/{name}/{GRAPH_NAME}", size_bytes=graph_bytes(folder))
        finding = examiner.examine_candidate(candidate, built.path, ctx.artifacts["export"].contract, ctx)
        found = replace(candidate, verdict=finding.to_json(), reason=finding.reason, detail=finding.detail)
        yield timed_against(parent, found, ctx)
