"""``hfaccel inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfaccel.cli.output import Output


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Compiled folder.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the whole manifest on standard output.")] = False,
) -> None:
    """Show what an artifact is: source, precision, inputs and outputs, what was tried, stages, versions.

    Example:
      hfaccel inspect minilm
    """
    from hfaccel.artifact.manifest import read_manifest
    from hfaccel.report.facts import cache_of, engine_of, many_rows_of, threads_of
    from hfaccel.report.markdown import candidate_rows
    from hfaccel.report.wording import cache_words

    printer = Output(as_json=json)
    manifest = read_manifest(artifact)
    printer.result(manifest)
    source, target = manifest["source"], manifest["target"]
    measured = "" if target["speed_measured_on_it"] else " (speed not measured on it)"
    rows = [
        ["source", source["id"]],
        ["sha256", source["sha256"]],
        ["task", source["task"]],
        ["precision", manifest["precision"]],
        ["chosen", manifest["chosen"]],
        ["target", target["name"] + measured],
        ["engine", engine_of(manifest)],
        ["size", f"{sum(item['size_bytes'] for item in manifest['files']) / 1e6:.1f} MB in {len(manifest['files'])} files"],
    ]
    stored = cache_of(manifest)
    if stored is not None:
        rows.append(["keys and values", cache_words(*stored)])
    many_rows = many_rows_of(manifest)
    if many_rows is not None:
        rows.append(["steps of several rows", many_rows])
    threads = threads_of(manifest)
    if threads is not None:
        rows.append(["threads", threads])
    reports = [name for name in ("report.html", "report.md") if (artifact / name).is_file()]
    if reports:
        rows.append(["report", ", ".join(str(artifact / name) for name in reports)])
    for kind in ("inputs", "outputs"):
        for spec in manifest["contract"][kind]:
            rows.append([kind[:-1], f"{spec['name']} {spec['dtype']} [{', '.join(map(str, spec['shape']))}]"])
    printer.table(str(artifact), ["what", "value"], rows)
    printer.table("what was tried", *candidate_rows(manifest))
    stages = [[item["stage"], item["status"], f"{item['seconds']:.1f}"] for item in manifest["stages"]]
    printer.table("stages", ["stage", "status", "seconds"], stages)
