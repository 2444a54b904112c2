"""The options that ``compile`` and ``plan`` share, and how they become a request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from hfaccel.evaluate.metrics import MetricName
    from hfaccel.request import CompileRequest

Model = Annotated[str, typer.Argument(help="Checkpoint: local folder, GGUF file or hub id.", show_default=False)]
OutputFolder = Annotated[Path, typer.Option("-o", "--output", help="Folder to make.", show_default=False)]
Task = Annotated[str | None, typer.Option(help="Task, where the checkpoint does not state it, e.g. text-classification.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub id: branch, tag or commit.")]
Target = Annotated[str, typer.Option(help="Where it will run; 'auto' is this host. See: hfaccel targets")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="Recipe name or file; chosen by architecture if not given.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Recipe value, e.g. --set quantize.calibration_examples=64 (repeatable).")
]
Data = Annotated[str | None, typer.Option(help="Evaluation data: CSV, TSV, JSONL, Parquet, text file, or a datasets name.")]
Calibration = Annotated[str | None, typer.Option(help="Texts for calibration; by default texts of --data, never their labels.")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="Column of a role, e.g. --column text=body (repeatable).")]
Metric = Annotated[str | None, typer.Option(help="Metric of the accuracy gate; by default that of the task.")]
MaxLoss = Annotated[str | None, typer.Option(help="Accuracy budget, relative, e.g. 1% or 0.01.")]
Objective = Annotated[str | None, typer.Option(help="What 'best' means: latency, throughput or size.")]
Workload = Annotated[str | None, typer.Option(help="Batch x length points, e.g. 1x16,1x128,8x128.")]
PrecisionName = Annotated[
    str | None, typer.Option("--precision", help="auto, fp32, bf16, int8 or int4; anything but auto is a demand.")
]
Engines = Annotated[
    str | None,
    typer.Option("--engine", help="Engines that may compete: auto, or names separated by commas: onnxruntime,openvino."),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Search thoroughly, at most this long, e.g. 10m: rungs that missed the accuracy gate return MatMuls to float, "
        "of decoders those in 4 bit to 8."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Threads that it will run with; by default as many as cores, fewer where that is faster."),
]
SlowestRun = Annotated[
    str | None,
    typer.Option("--p95", help="Limit on time: 95 of 100 runs at each point of the workload within this, e.g. 20ms."),
]
MaxSize = Annotated[str | None, typer.Option(help="Limit on graph and weights, e.g. 50MB.")]
Strict = Annotated[bool, typer.Option("--strict", help="A missed fusion contract fails.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Do not reuse results of earlier runs.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickle weights, which can run any code.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def make_request(
    *,
    model: str,
    output: Path,
    task: str | None,
    revision: str | None,
    target: str,
    recipe: str | None,
    overrides: Sequence[str] | None,
    data: str | None,
    calibration: str | None,
    columns: Sequence[str] | None,
    metric: str | None,
    max_loss: str | None,
    objective: str | None,
    workload: str | None,
    precision: str | None,
    engine: str | None,
    budget: str | None,
    threads: int | None,
    p95: str | None,
    max_size: str | None,
    strict: bool,
    force: bool,
    no_cache: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> CompileRequest:
    """The options as typed, as a request: what ``compile`` carries out and ``plan`` explains.

    Raises:
        UsageError: an option cannot be read.
    """
    from hfaccel.request import CompileRequest, recipe_settings

    return CompileRequest(
        model=model,
        output=output,
        revision=revision,
        task=task,
        target=target,
        recipe=recipe,
        settings=recipe_settings(
            max_loss=None if max_loss is None else parse_share(max_loss, option="--max-loss"),
            objective=objective,
            workload=workload,
            precision=precision,
            budget=None if budget is None else parse_duration(budget, option="--budget"),
            engines=engine,
            threads=threads,
            max_p95_ms=None if p95 is None else 1000 * parse_duration(p95, option="--p95"),
            max_size_bytes=None if max_size is None else parse_size(max_size, option="--max-size"),
        ),
        overrides=tuple(overrides or ()),
        data=data,
        calibration=calibration,
        columns=parse_columns(columns or ()),
        metric=cast("MetricName | None", metric),  # prepare() checks it
        strict=strict,
        force=force,
        use_cache=not no_cache,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def parse_share(text: str, *, option: str) -> float:
    """``1%`` or ``0.01`` as a share.

    Raises:
        UsageError: not a number, or not between 0 and 1.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{text!r} is not a share", where=option, hint="write 1% or 0.01") from None
    if not 0 < share < 1:
        raise UsageError(f"{text!r} is not between 0 and 100 %", where=option, hint="write 1% or 0.01")
    return share


def parse_duration(text: str, *, option: str) -> float:
    """``20ms``, ``90``, ``90s``, ``10m`` or ``1h`` in seconds.

    Raises:
        UsageError: not such a text, or not above 0.
    """
    return _parse_amount(
        text, {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}, option, what="a time", hint="write 20ms, 90s, 10m or 1h"
    )


def parse_size(text: str, *, option: str) -> int:
    """``50MB``, ``1.5GB``, ``48MiB`` or a number of bytes, in bytes.

    Raises:
        UsageError: not such a text, or not above 0.
    """
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1.0}
    return round(_parse_amount(text, units, option, what="a size", hint="write 50MB, 48MiB or 1.5GB"))


def _parse_amount(text: str, units: Mapping[str, float], option: str, *, what: str, hint: str) -> float:
    unit = next((name for name in units if text.endswith(name)), "")
    try:
        amount = float(text.removesuffix(unit)) * units.get(unit, 1.0)
    except ValueError:
        raise UsageError(f"{text!r} is not {what}", where=option, hint=hint) from None
    if not 0 < amount < math.inf:
        raise UsageError(f"{text!r} is not above 0", where=option, hint=hint)
    return amount


def parse_columns(items: Sequence[str]) -> dict[str, str]:
    """``role=column`` items as a mapping.

    Raises:
        UsageError: an item without '='.
    """
    columns = {}
    for item in items:
        role, separator, column = item.partition("=")
        if not separator or not role or not column:
            raise UsageError(f"{item!r} is not role=column", where="--column", hint="for example --column text=body")
        columns[role] = column
    return columns
