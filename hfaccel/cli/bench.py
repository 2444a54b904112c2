"""``hfaccel bench``: a compiled folder against its source in torch, on this machine, over a workload."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfaccel.measure.bench import Contender, Mode, Row
    from hfaccel.measure.fresh_process import FreshProcess
    from hfaccel.measure.peers import PeerName
    from hfaccel.runtime.model import Model

_ARTIFACT_NAME = "artifact"
_MEBIBYTE = 1024 * 1024


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that hfaccel compile made.")],
    against: Annotated[str, typer.Option(help="Engines to compare with, separated by commas: torch. Empty: none.")] = "torch",
    model: Annotated[str | None, typer.Option(help="Source checkpoint for torch; default: the one in the manifest.")] = None,
    workload: Annotated[str, typer.Option(help="Points of batch x tokens.")] = "1x16,1x128,8x128",
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Time only from text to answer.")] = False,
    graph_only: Annotated[bool, typer.Option("--graph-only", help="Time only the graph, on ready-made token ids.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each point, all engines together.")] = 5.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the medians into this .png or .svg file.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let Python code of the checkpoint run in torch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, samples included.")] = False,
) -> None:
    """Time a compiled model against torch (eager, fp32), interleaved, with the same threads, tokenizer and inputs."""
    from hfaccel.artifact.manifest import read_manifest
    from hfaccel.measure.bench import MODES, run_bench
    from hfaccel.measure.host import busy_warning, load_average
    from hfaccel.measure.peers import check_lengths, contender, example_inputs, parse_peers, without_cache
    from hfaccel.measure.plot import check_plot_path, draw
    from hfaccel.measure.workload import parse_workload
    from hfaccel.runtime.load import load

    output = Output(as_json=as_json)
    points, peer_names = parse_workload(workload), parse_peers(against)
    modes: tuple[Mode, ...] = MODES
    if end_to_end != graph_only:
        modes = ("end to end",) if end_to_end else ("graph only",)
    if plot is not None:
        check_plot_path(plot)
    manifest = read_manifest(artifact)
    opened = without_cache(load(artifact), artifact)
    check_lengths(points, opened.contract)
    threads = _threads(manifest)
    peers = _peers(peer_names, opened, model or _source_of(manifest), threads, trust_remote_code)
    warnings = [warning] if (warning := busy_warning()) else []
    for warning in warnings:
        output.warn(warning)
    load_before = load_average()
    rows = run_bench(contender(_ARTIFACT_NAME, opened), peers, points, modes=modes, seconds=seconds, on_step=output.step)
    output.step("loading in fresh processes")
    fresh = _fresh(artifact, example_inputs(opened, points[0], seed=0))
    size_bytes = sum(int(record["size_bytes"]) for record in manifest["files"])
    context = {"artifact": str(artifact), "threads": threads, "load_average": load_before, "warnings": warnings}
    _show(output, rows, fresh, size_bytes, context)
    if plot is not None:
        draw(rows, plot, title=f"{artifact.resolve().name}, {threads} threads")
        output.info(f"picture: {plot}")


def _peers(
    names: Sequence[PeerName], artifact: Model, source: str | None, threads: int, trust_remote_code: bool
) -> list[Contender]:
    from hfaccel.measure.peers import contender, torch_peer

    if not names:
        return []
    if source is None:
        raise UsageError(
            "the manifest names no source checkpoint to compare with", where="--model", hint="give --model CHECKPOINT"
        )
    return [contender("torch fp32", torch_peer(source, artifact, threads=threads, trust_remote_code=trust_remote_code))]


def _source_of(manifest: dict[str, Any]) -> str | None:
    """The recorded checkpoint: its folder while that exists, else the id that the user gave."""
    source = manifest.get("source", {})
    folder = source.get("folder")
    if folder and Path(folder).is_dir():
        return str(folder)
    name = source.get("id")
    return None if name is None else str(name)


def _threads(manifest: dict[str, Any]) -> int:
    """Threads that the artifact runs with, and so its peers: as its session settings say, by default the physical cores."""
    from hfaccel.measure.host import physical_cores

    return int(manifest.get("session", {}).get("intra_op_num_threads", 0)) or physical_cores()


def _fresh(artifact: Path, inputs: Sequence[Any]) -> FreshProcess:
    from hfaccel.measure.fresh_process import measure_fresh_process

    return measure_fresh_process(artifact, inputs)


def _show(output: Output, rows: Sequence[Row], fresh: FreshProcess, size_bytes: int, context: dict[str, Any]) -> None:
    from hfaccel.measure.bench import COLUMNS
    from hfaccel.measure.host import host_fingerprint

    host = host_fingerprint()
    output.result(
        {
            **context,
            "host": host,
            "rows": [row.to_json() for row in rows],
            "fresh_process": asdict(fresh),
            "size_bytes": size_bytes,
        }
    )
    output.table(f"{host['cpu']}, {context['threads']} threads", COLUMNS, [row.cells() for row in rows])
    output.line(
        f"fresh process: import {fresh.import_ms:.0f} ms, load {fresh.load_ms:.0f} ms, first answer "
        f"{fresh.first_answer_ms:.0f} ms, peak memory {fresh.peak_memory_bytes / _MEBIBYTE:.0f} MiB"
    )
    output.line(f"files: {size_bytes / _MEBIBYTE:.1f} MiB")
