"""Types that the pipeline and its stages share; no behaviour.

A stage is a module with ``NAME``, ``REVISION``, ``LIBRARIES``, ``settings``, ``requires`` and one ``run``; :class:`Stage` describes it,
nothing inherits from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.evaluate.metrics import MetricName
    from hfaccel.recipe.schema import Recipe
    from hfaccel.recipe.targets import TargetProfile
    from hfaccel.source.model import SourceModel

StageName = Literal["export", "optimize", "fuse", "quantize", "accuracy"]
STAGES: tuple[StageName, ...] = get_args(StageName)


class Progress(Protocol):
    """Where long work reports to; the command line draws it, the Python API drops it."""

    def stage(self, name: StageName, index: int, total: int) -> None:
        """Say that a stage starts, the ``index``-th (from 1) of ``total``."""

    def step(self, text: str) -> None:
        """Say what is being done now."""

    def advance(self, done: int, total: int) -> None:
        """Say that of the current stage ``done`` of ``total`` parts are finished."""

    def warn(self, text: str) -> None:
        """Say something that the user must see and that the manifest records."""


@dataclass(frozen=True)
class StageContext:
    """All that a stage may look at beside its input artifact and its settings.

    Attributes:
        workdir: empty folder that the stage writes its artifact into.
        source: the checkpoint.
        recipe: the resolved recipe.
        target: profile that the artifact is compiled for.
        on_target: whether this host is the target, so that timing here means something.
        artifacts: artifacts of the earlier stages, by stage name.
        dataset: evaluation data of the user, or None.
        calibration: texts for calibration (pairs as tuples), empty when none were given.
        metric: the metric that the user asked for; None takes the task's default.
        progress: where to report.
        journal: file for notes on long work, kept over a kill until the stage has finished; None keeps none.
    """

    workdir: Path
    source: SourceModel
    recipe: Recipe
    target: TargetProfile
    on_target: bool
    artifacts: Mapping[StageName, Artifact]
    dataset: Dataset | None
    calibration: tuple[Any, ...]
    metric: MetricName | None
    progress: Progress
    journal: Path | None = None


@dataclass(frozen=True)
class StageResult:
    """What a stage gives back: its artifact, whether it changed anything, and numbers for the record."""

    artifact: Artifact
    changed: bool
    metrics: Mapping[str, Any]


class Stage(Protocol):
    """The module contract of a stage."""

    NAME: StageName
    REVISION: int
    LIBRARIES: Sequence[str]

    def settings(self, recipe: Recipe) -> Mapping[str, Any]:
        """The part of the recipe that changes the bytes this stage writes: its share of the cache key."""

    def requires(self, artifact: Artifact | None, ctx: StageContext) -> list[str]:
        """Problems that make running pointless; empty when the stage can run."""

    def run(self, artifact: Artifact | None, ctx: StageContext) -> StageResult:
        """Do the work inside ``ctx.workdir``; the input artifact is never edited."""
