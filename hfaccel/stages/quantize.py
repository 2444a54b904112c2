"""Stage 4: build the ladder's candidates and time each against the float parent; the accuracy stage judges them."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import HfaccelError
from hfaccel.evaluate.cached_decoding import open_encoder_decoder
from hfaccel.evaluate.parity import make_answer_inputs
from hfaccel.measure.workload import Point, make_feeds
from hfaccel.quant.build import BuiltCandidate, build_candidate
from hfaccel.quant.calibration import STATISTICS_FOLDER, save_statistics
from hfaccel.quant.observed import CalibrationData, covers, gather_statistics
from hfaccel.quant.quantize_cache import why_no_quantized_cache
from hfaccel.rewrites.graphs import GRAPH_NAME, copy_graph, graph_bytes, link_graph, load_graph, save_graph
from hfaccel.rewrites.mask_always import mask_always
from hfaccel.rewrites.rotate_residual import NOT_ROTATABLE, can_rotate
from hfaccel.runtime.engines import engine_available, open_graph
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.stages.base import StageContext, StageName, StageResult
from hfaccel.stages.calibrate import calibration_batches
from hfaccel.stages.candidates import FLOAT_PARENT, Candidate, Reason, save_candidates
from hfaccel.stages.float_precision import with_faster_precision
from hfaccel.stages.parents import float_graphs
from hfaccel.stages.race import Entrant, RaceResult, quick_race, with_timings

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.contract import Contract
    from hfaccel.quant.calibration import ActivationStatistics
    from hfaccel.recipe.schema import GraphScope, Recipe, Rung
    from hfaccel.recipe.targets import TargetProfile

NAME: StageName = "quantize"
REVISION = 43
LIBRARIES = ("onnx", "onnx-ir", "onnxruntime", "openvino", "tokenizers", "numpy")

GRAPHS = "graphs"
"""Folder of the graphs while they are built; each candidate that uses one gets a link to it."""


def settings(recipe: Recipe) -> Mapping[str, Any]:
    """What of the recipe changes the candidates or their timing."""
    ladder = recipe.quantize.model_dump(exclude={"fallback", "search_seconds"})  # the search is of the accuracy stage
    measure = recipe.measure.model_dump(exclude={"max_p95_ms"})  # the final race is of the accuracy stage too
    hopeless = [
        rung.name for rung in recipe.quantize.ladder if _is_hopeless(rung, recipe)
    ]  # the budget itself changes nothing else
    return {"quantize": ladder, "measure": measure, "hopeless": hopeless, "seed": recipe.seed}


def requires(artifact: Artifact | None, ctx: StageContext) -> list[str]:
    """A float graph."""
    return [] if artifact is not None else ["quantize needs a float graph"]


def run(artifact: Artifact | None, ctx: StageContext) -> StageResult:
    """Make a folder with the float graph, every candidate that was built and not slower, and ``candidates.json``."""
    assert artifact is not None  # the pipeline checked requires()
    parents = float_graphs(ctx)
    graphs: dict[Rung, BuiltCandidate] = {}
    built = [_build(rung, made, parents, graphs, ctx) for rung, made in _rungs(parents, ctx)]
    shutil.rmtree(ctx.workdir / GRAPHS, ignore_errors=True)
    floats: dict[str, Entrant] = {
        scope: Entrant(parent.graph_path, SessionSettings(), parent.size_bytes)
        for scope, parent in parents.items()
        # They are equal where the stage fuse is switched off, or found nothing to fuse.
        if scope == "optimized" or parent.files != parents["optimized"].files
    }
    result = _race(floats, built, ctx)
    copy_graph(floats[result.parent].graph, ctx.workdir)
    floating = _limited(
        Candidate(
            FLOAT_PARENT,
            GRAPH_NAME,
            "fp32",
            SessionSettings(),
            size_bytes=graph_bytes(ctx.workdir),
            timings=result.timings.get(result.parent, ()),
        ),
        ctx,
    )
    candidates = [floating, *(_timed(candidate, result, ctx) for candidate in built)]
    save_candidates(candidates, ctx.workdir)
    made = Artifact(ctx.workdir, GRAPH_NAME, "fp32", artifact.contract, record_files(ctx.workdir))
    alive = [candidate.name for candidate in candidates if candidate.reason is None]
    metrics = {
        "float_parent": result.parent,
        "float_ms": {
            scope: {item.point: item.candidate_ms for item in result.timings[scope]} for scope in floats if result.timings
        },
        "calibration_examples": len(ctx.calibration),
        "alive": alive,
        "dropped": {candidate.name: candidate.reason for candidate in candidates if candidate.reason},
    }
    return StageResult(made, len(alive) > 1, metrics)


def _rungs(parents: Mapping[GraphScope, Artifact], ctx: StageContext) -> Iterator[tuple[Rung, CalibrationData]]:
    """The ladder's rungs, each with what calibration found on its float graph; statistics are gathered once for graphs of the same products."""
    batches = calibration_batches(ctx)
    statistics: dict[GraphScope, Mapping[str, ActivationStatistics]] = {}
    rungs = (rung.for_target(bf16=ctx.target.bf16) for rung in ctx.recipe.quantize.ladder)
    wanted = [rung for rung in rungs if ctx.recipe.quantize.precision in ("auto", rung.precision)]
    ladder = [rung for rung in wanted if is_for_objective(rung, ctx.recipe)]
    for number, rung in enumerate(ladder):
        ctx.progress.step(f"quantizing: {rung.name}")
        ctx.progress.advance(number, 2 * len(ladder))  # the second half is timing
        competes = refusal(rung, ctx.recipe, ctx.target, on_target=ctx.on_target) is None
        if batches and competes and rung.needs_statistics and rung.graph not in statistics:
            graph = parents[rung.graph].graph_path
            known = next((found for found in statistics.values() if covers(found, graph)), None)
            statistics[rung.graph] = known or gather_statistics(graph, batches, ctx.workdir / "scratch")
            # the search for a fallback asks again
            save_statistics(statistics[rung.graph], ctx.workdir / STATISTICS_FOLDER / f"{rung.graph}.npz")
        yield rung, CalibrationData(batches, statistics.get(rung.graph, {}))
        gc.collect()  # graphs are full of reference cycles: without this, several candidates' weights live at once


def is_for_objective(rung: Rung, recipe: Recipe) -> bool:
    """Whether a rung serves what the recipe is after; a limit on size makes size an objective too."""
    objectives = {recipe.measure.objective} | ({"size"} if recipe.measure.max_size_bytes is not None else set())
    return not rung.objectives or bool(objectives & set(rung.objectives))


def _is_hopeless(rung: Rung, recipe: Recipe) -> bool:
    """Whether a rung would be refused for its loss; one that is demanded is built, so that its loss is seen."""
    return recipe.accuracy.max_loss < rung.least_budget and recipe.quantize.precision == "auto"


def refusal(rung: Rung, recipe: Recipe, target: TargetProfile, *, on_target: bool) -> tuple[Reason, str] | None:
    """Why a rung's engine, precision or purpose keeps it from competing here, or None.

    Args:
        rung: of the ladder.
        recipe: says which engines may compete, and for what objective.
        target: that the artifact is compiled for.
        on_target: whether candidates are timed: an engine beside onnxruntime is chosen by measurement only.
    """
    quantize = recipe.quantize
    # Beside openvino for an encoder onnxruntime runs the decoder whoever may compete.
    engine = rung.encoder_engine if rung.engine == "onnxruntime" else rung.engine
    if not is_for_objective(rung, recipe):
        return "not-for-objective", f"competes only for the objective {' or '.join(rung.objectives)} (--objective)"
    if _is_hopeless(rung, recipe):
        # Without the budget that was given: another one that is too small as well takes this stage from the cache.
        return "budget-too-small", f"needs an accuracy budget of {rung.least_budget:.0%} or more (--max-loss)"
    if quantize.engines != "auto" and engine not in quantize.engines:
        return "engine-not-wanted", f"engines that may compete: {', '.join(quantize.engines)} (--engine)"
    if quantize.engines == "auto" and engine != "onnxruntime" and not on_target:
        detail = f"{engine} is chosen by measurement, and this host is not the target: name it with --engine to have it anyway"
        return "engine-not-wanted", detail
    if rung.inference_precision == "bf16" and not target.bf16:
        return "not-supported-by-target", f"{target.name} computes no bfloat16 matrix products in hardware"
    if not engine_available(engine):
        return "engine-not-installed", f"run: pip install 'hfaccel[{engine}]'"
    return None


def _build(
    rung: Rung,
    calibration: CalibrationData,
    parents: Mapping[GraphScope, Artifact],
    graphs: dict[Rung, BuiltCandidate],
    ctx: StageContext,
) -> Candidate:
    """The rung's graph under ``candidates/``, or the reason why there is none; ``graphs`` are those that rungs can share."""
    empty = Candidate(rung.name, "", rung.precision, rung.session())
    refused = refusal(rung, ctx.recipe, ctx.target, on_target=ctx.on_target)
    if refused is not None:
        return replace(empty, reason=refused[0], detail=refused[1])
    unfit = _why_unfit(rung, parents[rung.graph].graph_path, ctx.artifacts["export"].contract)
    if unfit is not None:
        return replace(empty, reason="not-supported-by-model", detail=unfit)
    if rung.needs_calibration and not calibration.batches:
        detail = "static ranges, smoothing and outliers are measured on real text: give --calibration FILE or --data FILE"
        return replace(empty, reason="needs-calibration-data", detail=detail)
    folder = ctx.workdir / "candidates" / rung.name
    folder.mkdir(parents=True)
    try:
        key = rung.quantization()
        if key not in graphs:
            graphs[key] = _graph(rung, len(graphs), calibration, parents[rung.graph].graph_path, ctx)
        built = graphs[key]
        link_graph(built.path, folder)
        fitted = with_faster_precision(rung, folder / GRAPH_NAME, graph_bytes(folder), ctx)
        finite = _is_finite(folder / GRAPH_NAME, fitted.session(), ctx)
    except (HfaccelError, ValueError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        shutil.rmtree(folder)
        return replace(empty, reason="build-failed", detail=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    made = replace(
        empty,
        session=fitted.session(),
        graph=f"candidates/{rung.name}/{GRAPH_NAME}",
        size_bytes=graph_bytes(folder),
        quantized=len(built.quantized),
        kept_float=built.kept_float,
        blockwise=rung.blockwise_matmuls,
        channelwise=rung.outlier_matmuls,
    )
    if not finite:
        return _dropped(made, "not-finite", "the graph gives NaN or infinity", ctx)
    limited = _limited(made, ctx)
    return made if limited.reason is None else _dropped(made, limited.reason, limited.detail, ctx)


def _why_unfit(rung: Rung, graph: Path, contract: Contract) -> str | None:
    """What of a rung this model has no place for; None: nothing."""
    encodes_only = contract.generation is None
    encodes_first = contract.generation is not None and contract.generation.encoder is not None
    if rung.engine != "onnxruntime" and not encodes_only:
        return f"only onnxruntime runs a decoder with its cache, {rung.engine} at most an encoder before it (encoder_engine)"
    if rung.encoder_engine != "onnxruntime" and not encodes_first:
        return f"the model has no encoder beside a decoder, which alone could run in {rung.encoder_engine} (encoder_engine)"
    if encodes_first and rung.needs_statistics and not rung.blockwise_decoder:
        return "only the encoder of an encoder-decoder is calibrated: give the decoder blocks (blockwise_decoder)"
    if encodes_first and rung.needs_runs:
        return "only the encoder of an encoder-decoder is calibrated, and only for ranges, smoothing and outlier neurons"
    unfit = why_no_quantized_cache(load_graph(graph)) if rung.cache_bits in (4, 8) else None
    if unfit is None and rung.rotate is True and not can_rotate(load_graph(graph)):
        return NOT_ROTATABLE
    return unfit


def _limited(candidate: Candidate, ctx: StageContext) -> Candidate:
    """The candidate, with a reason where its graph and weights are larger than the recipe allows."""
    limit = ctx.recipe.measure.max_size_bytes
    if limit is None or candidate.size_bytes <= limit:
        return candidate
    detail = f"{candidate.size_bytes / 1e6:.1f} MB of graph and weights, limit {limit / 1e6:g} MB"
    return replace(candidate, reason="size-over-limit", detail=detail)


def _graph(rung: Rung, number: int, calibration: CalibrationData, floating: Path, ctx: StageContext) -> BuiltCandidate:
    """The graph of a rung under ``graphs/``; for the scheme ``none`` the float graph itself, or what an engine needs of it."""
    if rung.scheme == "none" and not rung.masks_always:
        return BuiltCandidate(floating, (), (), ())
    folder = ctx.workdir / GRAPHS / str(number)
    shutil.rmtree(folder, ignore_errors=True)  # of a rung that failed
    folder.mkdir(parents=True)
    if rung.scheme == "none":
        model = load_graph(floating)
        mask_always(model)
        return BuiltCandidate(save_graph(model, folder), (), (), ())
    return build_candidate(rung, floating, calibration, weights=ctx.recipe.quantize.weights, folder=folder)


def _race(floats: Mapping[str, Entrant], built: Sequence[Candidate], ctx: StageContext) -> RaceResult:
    """Timings where this host is the target; elsewhere none, and the most fused float graph is taken for the fastest."""
    alive = {item.name: Entrant(ctx.workdir / item.graph, item.session, item.size_bytes) for item in built if item.reason is None}
    if not ctx.on_target or len(floats) + len(alive) == 1:
        return RaceResult(list(floats)[-1], {})
    return quick_race(floats, alive, ctx)


def _timed(candidate: Candidate, result: RaceResult, ctx: StageContext) -> Candidate:
    timings = result.timings.get(candidate.name)
    if timings is None:
        return candidate
    timed = with_timings(candidate, timings, quick=True)
    return timed if timed.reason is None else _dropped(timed, timed.reason, timed.detail, ctx)


def _dropped(candidate: Candidate, reason: Reason, detail: str, ctx: StageContext) -> Candidate:
    shutil.rmtree((ctx.workdir / candidate.graph).parent)
    return replace(candidate, graph="", reason=reason, detail=detail)


def _is_finite(graph: Path, session: SessionSettings, ctx: StageContext) -> bool:
    contract = ctx.artifacts["export"].contract
    if contract.generation is not None and contract.generation.encoder is not None:
        size = ctx.source.vocabulary_size
        feeds = make_answer_inputs(("1x3",), contract, vocabulary_size=size, seed=ctx.recipe.seed)["1x3"]
        model = open_encoder_decoder(graph, session, contract.generation)
        logits = model.prefill(model.encode(feeds), feeds["decoder_input_ids"].tolist()).logits
        return bool(np.isfinite(logits).all())
    if contract.generation is not None:
        logits = Decoder(graph, session, contract.generation).prefill([[contract.text.pad_token_id, 0, 1]]).logits
        return bool(np.isfinite(logits).all())
    runner = open_graph(graph, session)
    point = Point(2, min(16, contract.text.max_length))
    feeds = make_feeds(point, runner.input_names, vocabulary_size=ctx.source.vocabulary_size, seed=ctx.recipe.seed)
    return all(bool(np.isfinite(output).all()) for output in runner.run(feeds).values())
