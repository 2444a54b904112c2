"""The Python entry point: ``hfaccel.compile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfaccel.evaluate.metrics import MetricName
    from hfaccel.pipeline import CompileResult


class SilentProgress:
    """Keeps warnings for the caller and drops the rest.

    Attributes:
        warnings: what the user should know, in order.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, text: str) -> None:
        """Drop a progress line."""

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)


def compile(  # noqa: A001 - the design's public name
    model: str,
    *,
    output: str | Path,
    task: str | None = None,
    data: str | None = None,
    calibration: str | None = None,
    metric: MetricName | None = None,
    settings: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> CompileResult:
    """Compile a checkpoint into ``output``; see ``hfaccel compile --help`` for what the arguments mean.

    Args:
        model: hub id or local folder.
        output: folder to make.
        task: Hugging Face task name; inferred where the checkpoint states it.
        data: evaluation data file.
        calibration: texts for calibration.
        metric: metric of the accuracy gate.
        settings: dotted recipe paths and their values.
        overrides: ``key.path=value`` texts.
        force: replace an existing output.

    Raises:
        HfaccelError: see ``hfaccel.errors`` for its classes.
    """
    from hfaccel.pipeline import compile_model
    from hfaccel.request import CompileRequest

    request = CompileRequest(
        model=model,
        output=Path(output),
        task=task,
        data=data,
        calibration=calibration,
        metric=metric,
        settings=settings or {},
        overrides=overrides,
        force=force,
    )
    return compile_model(request, SilentProgress())
