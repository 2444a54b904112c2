"""Stage 4: build the ladder's candidates and time each against its float parent; the accuracy stage judges them."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import HfaccelError
from hfaccel.measure.host import physical_cores
from hfaccel.measure.timing import compare, interleaved
from hfaccel.measure.workload import make_feeds, parse_workload
from hfaccel.quant.build import build_candidate, gather_statistics
from hfaccel.rewrites.graphs import GRAPH_NAME, copy_graph
from hfaccel.runtime.batching import pad, plan_batches
from hfaccel.runtime.session import GraphSession
from hfaccel.runtime.tokenizer import TextTokenizer
from hfaccel.stages.base import StageContext, StageName, StageResult
from hfaccel.stages.candidates import FLOAT_PARENT, Candidate, PointTiming, save_candidates

if TYPE_CHECKING:
    from hfaccel.quant.calibration import ActivationStatistics, Feeds
    from hfaccel.recipe.schema import GraphScope, Recipe, Rung

NAME: StageName = "quantize"
REVISION = 1
LIBRARIES = ("onnx", "onnx-ir", "onnxruntime", "tokenizers", "numpy")
CALIBRATION_BATCH = 8
PAUSE_S = 0.002
"""Rest before each timed run, so that the spinning threads of the other session are asleep."""


def settings(recipe: Recipe) -> Mapping[str, Any]:
    """What of the recipe changes the candidates or their timing."""
    return {"quantize": recipe.quantize.model_dump(), "measure": recipe.measure.model_dump(), "seed": recipe.seed}


def requires(artifact: Artifact | None, ctx: StageContext) -> list[str]:
    """A float graph."""
    return [] if artifact is not None else ["quantize needs a float graph"]


def run(artifact: Artifact | None, ctx: StageContext) -> StageResult:
    """Make a folder with the float graph, every candidate that was built and not slower, and ``candidates.json``."""
    assert artifact is not None  # the pipeline checked requires()
    parents = _float_parents(ctx)
    parent_scope, parent_timings = _faster_parent(parents, ctx)
    parent = parents[parent_scope]
    copy_graph(parent.graph_path, ctx.workdir)
    session = SessionSettings(intra_op_num_threads=0)
    floating = Candidate(FLOAT_PARENT, GRAPH_NAME, "fp32", session, size_bytes=_graph_bytes(ctx.workdir))
    batches = calibration_batches(ctx)
    candidates = [floating]
    statistics: dict[GraphScope, Mapping[str, ActivationStatistics]] = {}
    if ctx.recipe.quantize.precision in ("auto", "int8"):
        for rung in ctx.recipe.quantize.ladder:
            ctx.progress.step(f"quantizing: {rung.name}")
            if batches and rung.needs_calibration and rung.graph in parents and rung.graph not in statistics:
                statistics[rung.graph] = gather_statistics(parents[rung.graph].graph_path, batches, ctx.workdir / "scratch")
            candidates.append(_candidate(rung, parents, parent, batches, statistics.get(rung.graph, {}), ctx))
    save_candidates(candidates, ctx.workdir)
    made = Artifact(ctx.workdir, GRAPH_NAME, "fp32", artifact.contract, record_files(ctx.workdir))
    alive = [candidate.name for candidate in candidates if candidate.reason is None]
    metrics = {
        "float_parent": parent_scope,
        "float_ms": parent_timings,
        "calibration_examples": len(ctx.calibration),
        "alive": alive,
        "dropped": {candidate.name: candidate.reason for candidate in candidates if candidate.reason},
    }
    return StageResult(made, len(alive) > 1, metrics)


def calibration_batches(ctx: StageContext) -> list[Feeds]:
    """Calibration texts as padded batches of similar length; empty when there are none."""
    if not ctx.calibration:
        return []
    contract = ctx.artifacts["export"].contract
    tokenizer = TextTokenizer(ctx.artifacts["export"].folder, contract.text)
    encoded = tokenizer.encode(ctx.calibration)
    order = plan_batches([len(item.ids) for item in encoded], max_batch=CALIBRATION_BATCH)
    np.random.default_rng(ctx.recipe.seed).shuffle(order)
    return [pad([encoded[index] for index in batch], contract.text) for batch in order]


def _float_parents(ctx: StageContext) -> dict[GraphScope, Artifact]:
    parents: dict[GraphScope, Artifact] = {"optimized": ctx.artifacts.get("optimize", ctx.artifacts["export"])}
    if "fuse" in ctx.artifacts:
        parents["fused"] = ctx.artifacts["fuse"]
    return parents


def _faster_parent(parents: Mapping[GraphScope, Artifact], ctx: StageContext) -> tuple[GraphScope, dict[str, float]]:
    """The float graph that candidates must beat: the fastest there is. Not on the target, the fused one is assumed."""
    if len(parents) == 1 or not ctx.on_target:
        return ("fused" if "fused" in parents else "optimized"), {}
    ctx.progress.step("timing the float graphs")
    timings = _time(parents["optimized"].graph_path, parents["fused"].graph_path, SessionSettings(), ctx)
    totals = {"optimized": sum(item.parent_ms for item in timings), "fused": sum(item.candidate_ms for item in timings)}
    return ("fused" if totals["fused"] <= totals["optimized"] else "optimized"), totals


def _candidate(
    rung: Rung,
    parents: Mapping[GraphScope, Artifact],
    parent: Artifact,
    batches: Sequence[Feeds],
    statistics: Mapping[str, ActivationStatistics],
    ctx: StageContext,
) -> Candidate:
    session = SessionSettings(disabled_optimizers=rung.disabled_optimizers)
    empty = Candidate(rung.name, "", "int8", session)
    if rung.needs_calibration and not batches:
        detail = "static ranges, smoothing and outliers are measured on real text: give --calibration FILE or --data FILE"
        return replace(empty, reason="needs-calibration-data", detail=detail)
    if rung.graph not in parents:
        return replace(empty, reason="build-failed", detail=f"there is no {rung.graph} graph: the stage is switched off")
    folder = ctx.workdir / "candidates" / rung.name
    folder.mkdir(parents=True)
    try:
        built = build_candidate(
            rung, parents[rung.graph].graph_path, batches, statistics, weight_bits=ctx.recipe.quantize.weight_bits, folder=folder
        )
        finite = _is_finite(GraphSession(built.path, session), ctx)
    except (HfaccelError, ValueError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        shutil.rmtree(folder)
        return replace(empty, reason="build-failed", detail=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    made = replace(
        empty,
        graph=f"candidates/{rung.name}/{GRAPH_NAME}",
        size_bytes=_graph_bytes(folder),
        quantized=len(built.quantized),
        kept_float=built.kept_float,
    )
    if not finite:
        shutil.rmtree(folder)
        return replace(made, graph="", reason="not-finite", detail="the graph gives NaN or infinity")
    if not ctx.on_target:
        return made
    timings = _time(parent.graph_path, built.path, session, ctx)
    speedup = _geometric_mean([item.speedup for item in timings])
    made = replace(made, timings=timings, speedup=speedup)
    if _geometric_mean([item.speedup_lower_bound for item in timings]) <= 1.0:
        shutil.rmtree(folder)
        return replace(made, graph="", reason="slower-than-parent", detail=f"{speedup:.2f}x its float parent, bound not above 1")
    return made


def _time(parent: Path, candidate: Path, session: SessionSettings, ctx: StageContext) -> tuple[PointTiming, ...]:
    """Interleaved runs of both graphs at every point of the workload, with as many threads as there are physical cores."""
    threads = physical_cores()
    runners = {
        "parent": GraphSession(parent, SessionSettings(intra_op_num_threads=threads)),
        "candidate": GraphSession(candidate, replace(session, intra_op_num_threads=threads)),
    }
    vocabulary_size = int(ctx.source.config.get("vocab_size", 2))
    results = []
    for point in parse_workload(ctx.recipe.measure.workload):
        feeds = make_feeds(point, runners["parent"].input_names, vocabulary_size=vocabulary_size, seed=ctx.recipe.seed)
        calls = {name: functools.partial(_call, runner, feeds) for name, runner in runners.items()}
        timings = interleaved(calls, seconds=ctx.recipe.measure.seconds_per_point, pause_s=PAUSE_S)
        result = compare(timings["parent"], timings["candidate"])
        results.append(
            PointTiming(
                str(point), timings["parent"].p50, timings["candidate"].p50, result.ratio, result.lower_bound, result.stable
            )
        )
    return tuple(results)


def _call(runner: GraphSession, feeds: Feeds) -> None:
    runner.run(feeds)


def _is_finite(runner: GraphSession, ctx: StageContext) -> bool:
    point = parse_workload("2x16")[0]
    feeds = make_feeds(
        point, runner.input_names, vocabulary_size=int(ctx.source.config.get("vocab_size", 2)), seed=ctx.recipe.seed
    )
    return all(bool(np.isfinite(output).all()) for output in runner.run(feeds).values())


def _graph_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name.startswith(GRAPH_NAME))


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(max(value, 1e-9)) for value in values) / len(values)) if values else 1.0
