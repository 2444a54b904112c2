"""The Python entry point: ``hfaccel.compile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.errors import MissingExtraError

if TYPE_CHECKING:
    from hfaccel.evaluate.metrics import MetricName
    from hfaccel.pipeline import CompileResult
    from hfaccel.recipe.schema import Objective
    from hfaccel.stages.base import Progress, StageName


class SilentProgress:
    """Keeps warnings for the caller and drops the rest.

    Attributes:
        warnings: what the user should know, in order.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def stage(self, name: StageName, index: int, total: int) -> None:
        """Drop the start of a stage."""

    def step(self, text: str) -> None:
        """Drop a progress line."""

    def advance(self, done: int, total: int) -> None:
        """Drop a count."""

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)


def compile(  # noqa: A001 - the design's public name
    model: str | Path,
    *,
    output: str | Path,
    task: str | None = None,
    revision: str | None = None,
    target: str = "auto",
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    data: str | Path | None = None,
    calibration: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    metric: MetricName | None = None,
    max_loss: float | None = None,
    objective: Objective | None = None,
    workload: str | Sequence[str] | None = None,
    precision: str | None = None,
    budget: float | None = None,
    engines: str | Sequence[str] | None = None,
    threads: int | None = None,
    max_p95_ms: float | None = None,
    max_size_bytes: int | None = None,
    strict: bool = False,
    force: bool = False,
    use_cache: bool = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a checkpoint into the folder ``output``, as ``hfaccel compile`` does.

    Example::

        import hfaccel

        result = hfaccel.compile("./checkpoint", output="out", data="test.csv", max_loss=0.01, workload=["1x16", "8x128"])
        print(result.manifest["chosen"])
        model = hfaccel.load(result.folder)

    Args:
        model: hub id or local folder.
        output: folder to make.
        task: Hugging Face task name; inferred where the checkpoint states it.
        revision: branch, tag or commit of a hub id.
        target: where it will run; ``auto`` is this host.
        recipe: name of a shipped recipe, or a file; None chooses by architecture.
        overrides: ``key.path=value`` texts that change recipe values (``--set``).
        data: evaluation data: a file, or the name of a data set.
        calibration: texts for calibration; None takes texts of ``data``, never their labels.
        columns: role -> column of the data, where the names do not tell (``--column``).
        metric: metric of the accuracy gate; None takes that of the task.
        max_loss: accuracy budget as a share, 0.01 is 1 %.
        objective: what ranks the candidates.
        workload: batch x length points, as a sequence or separated by commas.
        precision: ``fp32``, ``bf16``, ``int8`` or ``int4`` as a demand; None leaves it to the recipe.
        engines: which may compete: names as a sequence or separated by commas, or ``auto``; None leaves it to the recipe.
        budget: search thoroughly, at most so many seconds: rungs that missed the accuracy gate return MatMuls to float, of
            decoders those in 4 bit to 8.
        threads: that the artifact will run with, e.g. the cores of a serving container; None: as many as there are cores, fewer where
            that is measured to be faster.
        max_p95_ms: limit on the 95th percentile of a run's time, at every point of the workload.
        max_size_bytes: limit on graph and weights.
        strict: a missed fusion contract fails instead of warning.
        force: replace an existing output.
        use_cache: reuse results of earlier runs (``--no-cache`` is False).
        trust_remote_code: run code that comes with the checkpoint.
        allow_pickle: load pickle weights, which can run any code.
        progress: where to report; None reports nothing.

    Returns:
        The folder, its manifest, and whether it was up to date.

    Raises:
        HfaccelError: see ``hfaccel.errors`` for its classes.
    """
    require_compile_extra()
    from hfaccel.pipeline import compile_model
    from hfaccel.request import CompileRequest, recipe_settings

    request = CompileRequest(
        model=str(model),
        output=Path(output),
        revision=revision,
        task=task,
        target=target,
        recipe=_text(recipe),
        settings=recipe_settings(
            max_loss=max_loss,
            objective=objective,
            workload=workload,
            precision=precision,
            budget=budget,
            engines=engines,
            threads=threads,
            max_p95_ms=max_p95_ms,
            max_size_bytes=max_size_bytes,
        ),
        overrides=tuple(overrides),
        data=_text(data),
        calibration=_text(calibration),
        columns=columns or {},
        metric=metric,
        strict=strict,
        force=force,
        use_cache=use_cache,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    return compile_model(request, progress or SilentProgress())


def require_compile_extra() -> None:
    """Say at once, and by name, when the compiler's packages are not installed.

    Raises:
        MissingExtraError: one of them is missing.
    """
    from importlib.util import find_spec

    for package in ("torch", "transformers", "onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(package, extra="compile", needed_for="compiling")


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)
