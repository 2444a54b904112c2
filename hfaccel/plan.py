"""What a compile run would do and cost: cache hits, time, memory and disk, without running a stage."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hfaccel.artifact.cache_space import cache_limit_bytes, entries
from hfaccel.artifact.store import StageCache, default_cache_folder
from hfaccel.measure.memory import available_memory_bytes
from hfaccel.pipeline import stage_key, stages_of
from hfaccel.stages.base import StageName
from hfaccel.stages.quantize import refusal
from hfaccel.stages.race import QUICK

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.request import Plan
    from hfaccel.stages.base import Stage

StageState = Literal["cached", "runs", "unknown", "skipped"]
OutputState = Literal["new", "exists: replaced only with --force, or up to date", "exists: will be replaced"]
MEASURED, ESTIMATE = "measured in an earlier run", "estimate"
COMPARABLE_FACTOR = 4
"""An earlier run speaks for checkpoints up to so many times smaller or larger."""
SAMPLE_EXAMPLES = 200
"""Texts that candidates are judged on when no data is given, about."""


@dataclass(frozen=True)
class StageCost:
    """What running a stage takes.

    Attributes:
        seconds: wall time.
        peak_memory_bytes: most memory that its process has resident.
        size_bytes: what its result takes in the cache.
        basis: whether an earlier run was measured (and scaled to this checkpoint's size) or this is the formula alone.
    """

    seconds: float
    peak_memory_bytes: int
    size_bytes: int
    basis: str

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class StageForecast:
    """One stage of a run to come.

    Attributes:
        state: ``cached``: its result is there; ``runs``: it is not; ``unknown``: that shows when ``waits_for`` has run,
            since the result of that stage is part of this one's key; ``skipped``: the recipe switches it off.
        waits_for: with ``unknown`` only.
        cost: None for stages that are cached or skipped.
    """

    name: StageName
    state: StageState
    waits_for: StageName | None
    cost: StageCost | None


@dataclass(frozen=True)
class Forecast:
    """What a compile run would do; stages of the state ``unknown`` are counted as if they ran."""

    plan: Plan
    stages: tuple[StageForecast, ...]
    output_state: OutputState
    cache_folder: Path
    cache_used_bytes: int
    cache_limit_bytes: int
    available_memory_bytes: int
    free_disk_bytes: int

    @property
    def seconds(self) -> float:
        """Wall time of all stages that run."""
        return round(sum(stage.cost.seconds for stage in self.stages if stage.cost), 1)

    @property
    def peak_memory_bytes(self) -> int:
        """Memory of the stage that needs the most."""
        return max((stage.cost.peak_memory_bytes for stage in self.stages if stage.cost), default=0)

    @property
    def cache_bytes(self) -> int:
        """What the run adds to the cache."""
        return sum(stage.cost.size_bytes for stage in self.stages if stage.cost)


def forecast(plan: Plan) -> Forecast:
    """Look up what the cache holds for a checked request and predict the rest."""
    folder = default_cache_folder()
    found = entries(folder)
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return Forecast(
        plan=plan,
        stages=_stages(plan, StageCache(folder, enabled=plan.request.use_cache), [entry.record for entry in found]),
        output_state=_output_state(plan),
        cache_folder=folder,
        cache_used_bytes=sum(entry.size_bytes for entry in found),
        cache_limit_bytes=cache_limit_bytes(),
        available_memory_bytes=available_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(place).free,
    )


def _stages(plan: Plan, cache: StageCache, records: Sequence[Mapping[str, Any]]) -> tuple[StageForecast, ...]:
    stages: list[StageForecast] = []
    artifact: Artifact | None = None
    missed: StageName | None = None
    for module, wanted in stages_of(plan):
        stage = cast("Stage", module)
        if not wanted:
            stages.append(StageForecast(stage.NAME, "skipped", None, None))
            continue
        if missed is None and cache.enabled:
            found = cache.find(stage_key(stage, artifact, plan))
            if found is not None:
                artifact = found.artifact
                stages.append(StageForecast(stage.NAME, "cached", None, None))
                continue
        # Without the cache every stage runs, whatever the one before it gives.
        known = missed is None or not cache.enabled
        cost = _cost(stage.NAME, plan, records)
        stages.append(StageForecast(stage.NAME, "runs" if known else "unknown", None if known else missed, cost))
        missed = stage.NAME
    return tuple(stages)


def _output_state(plan: Plan) -> OutputState:
    output = plan.request.output
    if not output.is_dir() or not any(output.iterdir()):
        return "new"
    return "exists: will be replaced" if plan.request.force else "exists: replaced only with --force, or up to date"


def _cost(stage: StageName, plan: Plan, records: Sequence[Mapping[str, Any]]) -> StageCost:
    """The formula, corrected by how far it was off in the earlier run of the checkpoint most alike in size."""
    weight_bytes = plan.source.weight_bytes
    here = _estimate(stage, plan, weight_bytes)
    measured = _nearest(stage, weight_bytes, records)
    if measured is None:
        return here
    there = _estimate(stage, plan, measured["weight_bytes"])
    return StageCost(
        round(measured["seconds"] * here.seconds / there.seconds, 2),
        round(measured["peak_memory_bytes"] * here.peak_memory_bytes / there.peak_memory_bytes),
        round(measured["size_bytes"] * here.size_bytes / there.size_bytes),
        MEASURED,
    )


def _nearest(stage: StageName, weight_bytes: int, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    def distance(record: Mapping[str, Any]) -> float:
        return abs(math.log(record["weight_bytes"] / weight_bytes))

    numbers = ("weight_bytes", "seconds", "peak_memory_bytes", "size_bytes")
    usable = [record for record in records if record.get("stage") == stage and all(record.get(name) for name in numbers)]
    nearest = min(reversed(usable), key=distance, default=None)  # of several alike the latest
    return nearest if nearest is not None and distance(nearest) <= math.log(COMPARABLE_FACTOR) else None


def _estimate(stage: StageName, plan: Plan, weight_bytes: int) -> StageCost:
    """The stated formula, fitted to compiles of checkpoints from 1 MB to 100 MB on two cores.

    A stage starts Python and its libraries, and then works in proportion to the weights. Candidates are built in proportion to the
    weights too, but timed for as long as the recipe says; judging grows with the number of examples and of candidates.
    """
    recipe, gigabytes = plan.recipe, weight_bytes / 1e9
    ladder = recipe.quantize.ladder if recipe.quantize.enabled else ()
    candidates = 1 + sum(
        (bool(plan.calibration) or not rung.needs_calibration)
        and refusal(rung, recipe, plan.target, on_target=plan.on_target) is None
        for rung in ladder
    )
    examples = len(plan.dataset.examples) if plan.dataset else SAMPLE_EXAMPLES
    timed = QUICK * candidates * len(recipe.measure.workload) * recipe.measure.seconds_per_point if plan.on_target else 0.0
    seconds = {
        "export": 5 + 110 * gigabytes,
        "optimize": 3 + 5 * gigabytes,
        "fuse": 3 + 10 * gigabytes,
        "quantize": 3 + timed + 70 * candidates * gigabytes,
        "accuracy": 5 + 40 * gigabytes + 0.05 * examples * candidates * gigabytes,
    }[stage]
    memory = {
        "export": 600e6 + 3 * weight_bytes,
        "optimize": 500e6 + 4 * weight_bytes,
        "fuse": 500e6 + 4 * weight_bytes,
        "quantize": 900e6 + 6 * weight_bytes,
        "accuracy": 800e6 + 4 * weight_bytes,
    }[stage]
    # Of the candidates each is about 60 % of the float graph: embeddings stay in float.
    size = {"quantize": 1 + 0.6 * (candidates - 1), "accuracy": 0.6}.get(stage, 1.0) * weight_bytes
    return StageCost(round(seconds, 2), round(memory), max(1, round(size)), ESTIMATE)
