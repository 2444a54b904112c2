"""What all parts of ``hfaccel bench`` share: the command line, what a reader of the numbers must know, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from hfaccel.measure.peers.open import Absent
    from hfaccel.measure.stopwatch import Stopwatch
    from hfaccel.source.model import SourceModel


@dataclass(frozen=True)
class BenchRequest:
    """The command line, checked as far as it goes without the model.

    Attributes:
        folder: the artifact.
        manifest: of the artifact.
        workload: points separated by commas; None: the default.
        source: checkpoint to compare with; None where it is not known.
        threads: that all use.
        seconds: for each thing that is timed.
        plot: picture to draw.
        trust_remote_code: let Python code of the checkpoint run.
        huge_pages: as given to :func:`hfaccel.load` for the artifact.
    """

    folder: Path
    manifest: Mapping[str, Any]
    workload: str | None
    source: str | None
    threads: int
    seconds: float
    plot: Path | None
    trust_remote_code: bool
    huge_pages: bool | None


def load_source(asked: BenchRequest) -> tuple[SourceModel, Any]:
    """The checkpoint to compare with, and its module: float32, eval mode, attention as transformers chooses it.

    Sets torch's number of threads for the whole process.

    Raises:
        UsageError: no checkpoint is known.
        SourceError: it is not there any more, or not readable.
    """
    import torch

    from hfaccel.source.resolve import resolve_source
    from hfaccel.source.torch_model import load_torch_model

    if asked.source is None:
        raise UsageError(
            "the manifest names no source checkpoint to compare with", where="--model", hint="give --model CHECKPOINT"
        )
    torch.set_num_threads(asked.threads)
    task = asked.manifest["contract"]["task"]
    source = resolve_source(asked.source, task=task, trust_remote_code=asked.trust_remote_code)
    return source, load_torch_model(source, attention=None)


def bench_context(output: Output, asked: BenchRequest) -> dict[str, Any]:
    """What a reader of the numbers must know, taken before anything is timed."""
    from hfaccel.measure.host import busy_warning, host_fingerprint, load_average

    load_before = load_average()
    warnings = [warning] if (warning := busy_warning()) else []
    for warning in warnings:
        output.warn(warning)
    return {
        "artifact": str(asked.folder),
        "threads": asked.threads,
        "huge_pages": asked.huge_pages,
        "host": host_fingerprint(),
        "load_average": load_before,
        "warnings": warnings,
        "size_bytes": sum(int(record["size_bytes"]) for record in asked.manifest["files"]),
    }


def stopwatch(output: Output, seconds: float, failures: list[Absent]) -> Stopwatch:
    """What things are timed with: it tells the user what is being timed, and notes in ``failures`` which engines fail."""
    from hfaccel.measure.peers.open import Absent, one_line
    from hfaccel.measure.stopwatch import Stopwatch

    def note(name: str, error: Exception) -> None:
        failures.append(Absent(name, one_line(error)))

    return Stopwatch(seconds, on_step=output.step, on_failure=note)


def machine_title(context: Mapping[str, Any]) -> str:
    """What it was measured on, for the title of a table."""
    return f"{context['host']['cpu']}, {context['threads']} threads"


def draw_plot(output: Output, asked: BenchRequest, draw: Callable[[Path, str], None]) -> None:
    """Draw the picture that was asked for, if one was; ``draw`` is given its path and its title."""
    if asked.plot is not None:
        draw(asked.plot, f"{asked.folder.resolve().name}, {asked.threads} threads")
        output.info(f"picture: {asked.plot}")
