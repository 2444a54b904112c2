"""The main path: five stages in order; requires -> run -> verify -> record, each from the cache when nothing changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from hfaccel.artifact.artifact import Artifact, digest_of
from hfaccel.artifact.load_test import load_test
from hfaccel.artifact.manifest import read_manifest, verify_files
from hfaccel.artifact.store import StageCache, atomic_folder, default_cache_folder
from hfaccel.errors import GateError, IntegrityError, SettingsError
from hfaccel.evaluate import parity
from hfaccel.evaluate.cached_decoding import open_for_parity
from hfaccel.isolation import run_stage
from hfaccel.measure.host import host_fingerprint, library_versions
from hfaccel.publish import write_output
from hfaccel.request import CompileRequest, Plan, prepare
from hfaccel.stages import accuracy, export, fuse, optimize, quantize
from hfaccel.stages.base import Progress, Stage, StageContext, StageName

MEASURED: frozenset[StageName] = frozenset({"quantize", "accuracy"})
"""Stages whose result holds timings or kernels' rounding of this host, so the host is part of their key."""


@dataclass(frozen=True)
class CompileResult:
    """A finished run.

    Attributes:
        folder: the compiled folder.
        manifest: its manifest.
        up_to_date: the folder was there already, made by the same request from the same inputs.
        seconds: wall time of this run.
    """

    folder: Path
    manifest: Mapping[str, Any]
    up_to_date: bool
    seconds: float


def compile_model(request: CompileRequest, progress: Progress) -> CompileResult:
    """Export, optimize, fuse, quantize, judge, publish.

    Raises:
        HfaccelError: with the exit code of its class; nothing is published and an existing output is untouched.
    """
    started = time.monotonic()
    plan = prepare(request)
    for notice in plan.notices:
        progress.warn(notice)
    key = request_key(plan)
    finished = _finished_output(plan, key)
    with StageCache(default_cache_folder(), enabled=request.use_cache) as cache:
        artifacts, records = _run_stages(plan, cache, progress)
        if finished is not None:
            return CompileResult(request.output, finished, True, time.monotonic() - started)
        progress.step("writing the artifact and opening it in a fresh process")
        with atomic_folder(request.output, replace=True) as temporary:
            manifest = write_output(temporary, plan, artifacts, records, key=key, seconds=time.monotonic() - started)
            load_test(temporary)
    return CompileResult(request.output, manifest, False, time.monotonic() - started)


def stages_of(plan: Plan) -> list[tuple[ModuleType, bool]]:
    """The stages in order, each with whether the recipe wants it."""
    return [
        (export, True),
        (optimize, True),
        (fuse, plan.recipe.fuse.enabled),
        (quantize, plan.recipe.quantize.enabled),
        (accuracy, True),
    ]


def _run_stages(plan: Plan, cache: StageCache, progress: Progress) -> tuple[dict[StageName, Artifact], list[dict[str, Any]]]:
    artifacts: dict[StageName, Artifact] = {}
    records: list[dict[str, Any]] = []
    current: Artifact | None = None
    stages = stages_of(plan)
    for number, (module, wanted) in enumerate(stages, 1):
        stage = cast("Stage", module)
        progress.stage(stage.NAME, number, len(stages))
        if not wanted:
            records.append(
                {"stage": stage.NAME, "status": "skipped", "key": f"skipped-{stage.NAME}", "seconds": 0.0, "metrics": {}}
            )
            continue
        context = StageContext(
            workdir=Path(),
            source=plan.source,
            recipe=plan.recipe,
            target=plan.target,
            on_target=plan.on_target,
            artifacts=dict(artifacts),
            dataset=plan.dataset,
            calibration=plan.calibration,
            metric=plan.request.metric,
            progress=progress,
        )
        current, record = _run_or_reuse(stage, current, context, plan, cache)
        artifacts[stage.NAME] = current
        records.append(record)
        _check_contract(stage, record, plan, progress)
    return artifacts, records


def _run_or_reuse(
    stage: Stage, artifact: Artifact | None, context: StageContext, plan: Plan, cache: StageCache
) -> tuple[Artifact, dict[str, Any]]:
    key = stage_key(stage, artifact, plan)
    cached = cache.get(key)
    if cached is not None:
        context.progress.step(f"{stage.NAME}: unchanged, from the cache")
        return cached.artifact, {**cached.record, "status": "cached"}
    problems = stage.requires(artifact, context)
    if problems:
        raise SettingsError("; ".join(problems), where=stage.NAME)
    context.progress.step(f"{stage.NAME} ...")
    started, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    with cache.writing(key) as entry:
        journal = cache.root / "journals" / f"{key}.jsonl"
        run = run_stage(stage, artifact, replace(context, workdir=entry / "artifact", journal=journal))
        result = run.result
        checks = _verify(stage, result.artifact, context)
        record = {
            "stage": stage.NAME,
            "status": "done",
            "key": key,
            "source": plan.source.id,
            "weight_bytes": plan.source.weight_bytes,
            "started_at": started_at,
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_bytes": run.peak_memory_bytes,
            "changed": result.changed,
            "size_bytes": result.artifact.size_bytes,
            "metrics": {**result.metrics, **checks},
        }
        cache.write_record(entry, result.artifact, record)
    journal.unlink(missing_ok=True)
    stored = cache.take(key)  # of another run, if one has finished the same stage meanwhile
    if stored is None:
        raise IntegrityError(
            "the result of the stage vanished from the cache",
            where=stage.NAME,
            hint="run the same command again; finished stages are kept",
        )
    return stored.artifact, stored.record


def stage_key(stage: Stage, artifact: Artifact | None, plan: Plan) -> str:
    """Cache key of a stage: its input, and all that :func:`_inputs_of` names."""
    return digest_of({**_inputs_of(stage, plan), "input": artifact.digest if artifact is not None else plan.source.sha256})


def request_key(plan: Plan) -> str:
    """What an output folder is made from, known before any stage has run: two requests of one key give the same folder."""
    stages = [_inputs_of(cast("Stage", module), plan) for module, wanted in stages_of(plan) if wanted]
    return digest_of({"source": plan.source.sha256, "stages": stages})


def _inputs_of(stage: Stage, plan: Plan) -> dict[str, Any]:
    """The settings that change bytes, target, library versions, the stage's revision; host and data if it looks at them."""
    parts: dict[str, Any] = {
        "stage": stage.NAME,
        "revision": stage.REVISION,
        "task": plan.source.task,
        "settings": stage.settings(plan.recipe),
        "target": plan.target.name,
        "libraries": library_versions(stage.LIBRARIES),
    }
    if stage.NAME in MEASURED:
        parts["host"] = host_fingerprint()
        parts["calibration"] = plan.calibration_sha256
    if stage.NAME == "accuracy":
        parts["data"] = plan.dataset.sha256 if plan.dataset is not None else ""
        parts["examples"] = len(plan.dataset.examples) if plan.dataset is not None else 0
        parts["columns"] = dict(plan.request.columns)
        parts["metric"] = plan.request.metric
    return parts


def _verify(stage: Stage, artifact: Artifact, context: StageContext) -> dict[str, Any]:
    """What must hold after a stage: a valid graph that opens; float graphs answer as the source does."""
    import onnx

    try:
        onnx.checker.check_model(str(artifact.graph_path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise IntegrityError(
            f"the graph is not valid ONNX: {str(error).splitlines()[0]}", where=stage.NAME, hint="report this with --debug output"
        ) from error
    if stage.NAME not in ("optimize", "fuse"):
        return {}
    cases = parity.load_cases(context.artifacts["export"].folder / export.PARITY_FILE)
    result = parity.compare(open_for_parity(artifact.graph_path, artifact.contract), cases)
    export.check_parity(result, context, stage=stage.NAME)
    return {"parity": vars(result)}


def _check_contract(stage: Stage, record: Mapping[str, Any], plan: Plan, progress: Progress) -> None:
    missed = record["metrics"].get("contract_missed", []) if stage.NAME == "fuse" else []
    if missed and plan.request.strict:
        raise GateError(
            "; ".join(missed),
            where="fusion contract",
            hint="without --strict this is a warning; or correct fuse.contract in the recipe",
        )
    for line in missed:
        progress.warn(f"fusion contract: {line}")


def _finished_output(plan: Plan, key: str) -> dict[str, Any] | None:
    """The manifest of an output made from the very same inputs, if its files are whole; None when there is nothing yet.

    Raises:
        SettingsError: the folder holds something else, said before any work is done for nothing.
    """
    output = plan.request.output
    if plan.request.force or not output.is_dir() or not any(output.iterdir()):
        return None
    try:
        manifest = read_manifest(output)
        if manifest.get("key") == key and not verify_files(output):
            return manifest
    except IntegrityError:
        pass
    raise SettingsError(
        "the output folder holds another artifact, or a damaged one; it is left alone",
        where=str(output),
        hint="replace it with --force",
    )
