"""``hfaccel bench``: a compiled folder against other engines that run its source, on this machine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from hfaccel.cli.bench_frame import BenchRequest
    from hfaccel.measure.bench import Mode, Row
    from hfaccel.measure.fresh_process import FreshProcess
    from hfaccel.measure.peers import PeerName
    from hfaccel.measure.peers.open import Absent, OpenPeers
    from hfaccel.measure.stream import StreamRow
    from hfaccel.measure.workload import Point
    from hfaccel.runtime.model import Model
    from hfaccel.runtime.tokenizer import Text

_ARTIFACT_NAME = "artifact"
_DEFAULT_PEER = "torch"
_STREAM_BATCH = 32
_LADDER_REQUESTS = 8
_DEFAULT_WORKLOAD = "1x16,1x128,8x128"
_MEBIBYTE = 1024 * 1024
_ENCODER_DECODERS = ("text2text-generation", "automatic-speech-recognition")


@dataclass(frozen=True)
class _Texts:
    """Real texts: the stream (empty: none asked for), those to check answers on, those to calibrate with."""

    stream: tuple[Text, ...]
    check: tuple[Text, ...]
    calibration: tuple[Text, ...]


@dataclass(frozen=True)
class _Asked:
    """What to time."""

    points: tuple[Point, ...]
    modes: tuple[Mode, ...]
    seconds: float
    batch: int


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that hfaccel compile made.")],
    against: Annotated[
        str | None,
        typer.Option(
            show_default=_DEFAULT_PEER,
            help="Engines to compare with, separated by commas: torch, torch-bf16, torch-compile, onnxruntime-default "
            "(quantize_dynamic), openvino, openvino-int8 (NNCF), ctranslate2 (int8). For text generation: torch, "
            "onnxruntime-genai=FOLDER (a folder with genai_config.json), openvino=FOLDER (with openvino_model.xml), "
            "llama-cpp=FILE.gguf; for encoder-decoders: torch, ctranslate2. Empty: none. "
            "What is not installed is said.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Source checkpoint of the engines; default: that of the manifest.")] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            help=f"Points of batch x tokens, default {_DEFAULT_WORKLOAD}, with --stream none; for text generation "
            "prompt+new tokens, default 128+128; for text to text source+new tokens, default 128+32.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Speech: sounds to transcribe, as compile reads them, e.g. CSV with audio and text.")
    ] = None,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Time only from text to answer.")] = False,
    graph_only: Annotated[bool, typer.Option("--graph-only", help="Time only the graph, on ready-made token ids.")] = False,
    stream: Annotated[
        Path | None,
        typer.Option(
            help="Time all texts of this file in its order: one a line (.txt), or CSV, TSV, JSONL, Parquet. Text generation: "
            "time whole requests too, whose prompts are the beginnings of the first texts."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help=f"Texts of one batch of the stream, default {_STREAM_BATCH}; with --ladder, of text generation: requests that the "
            f"last step answers together, default {_LADDER_REQUESTS}.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Texts that openvino-int8 is calibrated with; default: a packaged sample.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each point, all engines together.")] = 5.0,
    ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="In place of engines: time the way from transformers out of the box to the artifact, step by step. Text "
            "generation begins without a key-value cache; models that read begin with each text padded to the longest length "
            "and a tokenizer in Python, on the texts of --stream or a packaged sample. It needs the float graphs in the stage cache.",
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the medians into this .png or .svg file.")] = None,
    huge_pages: Annotated[
        bool | None,
        typer.Option(
            "--huge-pages/--no-huge-pages",
            show_default=False,
            help="Whether to open the artifact with its weights in pages of 2 MiB (Linux); default: as load does.",
        ),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let Python code of the checkpoint run in torch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, samples included.")] = False,
) -> None:
    """Time a compiled model against other engines, interleaved, with the same threads, tokenizer and inputs.

    For example:

    hfaccel bench OUT

    hfaccel bench OUT --against torch,torch-bf16,torch-compile --workload 1x16,8x128

    hfaccel bench OUT --against onnxruntime-default,openvino,openvino-int8,ctranslate2 --calibration texts.txt

    hfaccel bench OUT --against torch,openvino --stream texts.csv --batch 32 --json

    hfaccel bench OUT --ladder --stream texts.csv --plot way.svg

    Where OUT generates text:

    hfaccel bench OUT --against torch,onnxruntime-genai=FOLDER --workload 128+128

    hfaccel bench OUT --against llama-cpp=model.Q4_0.gguf --workload 128+128

    hfaccel bench OUT --against torch --workload 128+128 --stream texts.txt

    hfaccel bench OUT --ladder --workload 128+128 --stream texts.txt --plot way.svg

    Where OUT is an encoder-decoder, of text or of speech:

    hfaccel bench OUT --against torch,ctranslate2 --workload 128+32

    hfaccel bench OUT --against torch,ctranslate2 --data speech.csv
    """
    from hfaccel.cli.bench_encoder_decoder import bench_encoder_decoder
    from hfaccel.cli.bench_frame import BenchRequest, bench_context, draw_plot
    from hfaccel.cli.bench_generation import bench_generation_model
    from hfaccel.cli.bench_ladder import bench_encoder_ladder, check_ladder
    from hfaccel.measure.contenders import check_lengths, example_inputs
    from hfaccel.measure.peers import parse_peers
    from hfaccel.measure.plot import check_plot_path, draw
    from hfaccel.measure.workload import Point, parse_workload

    output = Output(as_json=as_json)
    manifest = _read_manifest(artifact, ladder=ladder)
    threads = _threads(manifest)
    source = model or _source_of(manifest)
    task = _task(manifest)
    only_for_texts = {"--end-to-end": end_to_end, "--graph-only": graph_only, "--calibration": calibration is not None}
    request = BenchRequest(artifact, manifest, workload, source, threads, seconds, plot, trust_remote_code, huge_pages)
    engines = _DEFAULT_PEER if against is None else against
    if task in _ENCODER_DECODERS:
        bench_encoder_decoder(
            output, request, engines, data=data, refused={**only_for_texts, "--stream": stream is not None, "--ladder": ladder}
        )
        return
    _refuse_data(data, artifact)
    if ladder:
        check_ladder(against)
    if task == "text-generation":
        ladder_requests = (batch or _LADDER_REQUESTS) if ladder else None
        only_for_texts["--batch"] = batch is not None and not ladder
        bench_generation_model(output, request, engines, stream=stream, ladder_requests=ladder_requests, refused=only_for_texts)
        return
    if ladder:
        bench_encoder_ladder(
            output, request, stream, batch or _STREAM_BATCH, refused={**only_for_texts, "--workload": workload is not None}
        )
        return
    wanted = _DEFAULT_WORKLOAD if workload is None and stream is None else workload
    points = () if wanted is None else parse_workload(wanted)
    peer_names = parse_peers(engines)
    asked = _Asked(points, _modes(end_to_end, graph_only), seconds, batch or _STREAM_BATCH)
    if plot is not None:
        check_plot_path(plot)
    opened = _load_reader(request)
    check_lengths(points, opened.contract)
    texts = _read_texts(opened, stream, calibration)
    context = bench_context(output, request)
    with _peers(output, peer_names, opened, request, texts) as peers:
        rows, stream_rows, failures = _measure(output, opened, peers, asked, texts)
    output.step("loading in fresh processes")
    fresh = _fresh(artifact, example_inputs(opened, points[0] if points else Point(1, 16), seed=0))
    not_compared = [item.to_json() for item in (*peers.absent, *failures)]
    _show(output, rows, stream_rows, fresh, {**context, "not_compared": not_compared})
    draw_plot(output, request, lambda path, title: draw(rows, path, title=title, stream=stream_rows))


def _read_manifest(artifact: Path, *, ladder: bool) -> dict[str, Any]:
    from hfaccel.artifact.manifest import FILE_NAME, read_manifest

    if ladder and not (artifact / FILE_NAME).is_file():
        raise UsageError(
            "the ladder ends at a compiled model, and this is no compiled folder",
            where=str(artifact),
            hint=f"run: hfaccel compile {artifact} -o OUT; then: hfaccel bench OUT --ladder",
        )
    return read_manifest(artifact)


def _task(manifest: dict[str, Any]) -> object:
    """What the artifact is for; a manifest that does not say is left to what loads it."""
    contract = manifest.get("contract")
    return contract.get("task") if isinstance(contract, dict) else None


def _refuse_data(data: str | None, artifact: Path) -> None:
    if data is not None:
        raise UsageError(
            f"the option is for speech models, and {artifact} is none",
            where="--data",
            hint="leave it out; real texts of models that read are timed with --stream",
        )


def _load_reader(asked: BenchRequest) -> Model:
    """The artifact of a task that reads texts, with a tokenizer that remembers none."""
    from hfaccel.measure.contenders import without_cache
    from hfaccel.runtime.load import load
    from hfaccel.runtime.model import Model

    loaded = load(asked.folder, huge_pages=asked.huge_pages)
    if not isinstance(loaded, Model):
        raise UsageError("the manifest's task does not fit its model", where=str(asked.folder), hint="compile it again")
    return without_cache(loaded, asked.folder)


def _modes(end_to_end: bool, graph_only: bool) -> tuple[Mode, ...]:
    from hfaccel.measure.bench import MODES

    if end_to_end == graph_only:
        return MODES
    return ("end to end",) if end_to_end else ("graph only",)


def _read_texts(opened: Model, stream: Path | None, calibration: Path | None) -> _Texts:
    from hfaccel.measure.peers.texts import CALIBRATION_TEXTS, CHECK_TEXTS, packaged_texts, spread
    from hfaccel.measure.stream import read_texts

    check, calibrate = packaged_texts(opened.contract)
    texts = () if stream is None else read_texts(stream, opened.contract)
    if texts:
        check = spread(texts, CHECK_TEXTS)
    if calibration is not None:
        calibrate = spread(read_texts(calibration, opened.contract), CALIBRATION_TEXTS)
    return _Texts(texts, check, calibrate)


def _peers(
    output: Output,
    names: Sequence[PeerName],
    opened: Model,
    request: BenchRequest,
    texts: _Texts,
) -> AbstractContextManager[OpenPeers]:
    from hfaccel.measure.peers.open import OpenPeers, open_peers

    if not names:
        return nullcontext(OpenPeers((), (), None))
    if request.source is None:
        raise UsageError(
            "the manifest names no source checkpoint to compare with", where="--model", hint="give --model CHECKPOINT"
        )
    return open_peers(
        names,
        request.source,
        opened,
        threads=request.threads,
        check_texts=texts.check,
        calibration=texts.calibration,
        trust_remote_code=request.trust_remote_code,
        on_step=output.step,
    )


def _measure(
    output: Output, opened: Model, peers: OpenPeers, asked: _Asked, texts: _Texts
) -> tuple[Sequence[Row], Sequence[StreamRow], list[Absent]]:
    """Rows of the grid, rows of the stream, and which peers failed on the way."""
    from hfaccel.cli.bench_frame import stopwatch
    from hfaccel.measure.bench import run_bench
    from hfaccel.measure.contenders import contender
    from hfaccel.measure.stream import run_stream, stream_runs

    for item in peers.absent:
        output.warn(f"{item.name}: {item.reason}")
    failures: list[Absent] = []
    watch = stopwatch(output, asked.seconds, failures)
    rows: Sequence[Row] = ()
    stream_rows: Sequence[StreamRow] = ()
    if asked.points:
        own = contender(_ARTIFACT_NAME, opened, likeness=peers.artifact_likeness)
        others = [contender(peer.label, peer.model, likeness=peer.likeness) for peer in peers.peers]
        rows = run_bench(own, others, asked.points, modes=asked.modes, watch=watch)
    if texts.stream:
        likeness = peers.artifact_likeness
        runs = stream_runs(_ARTIFACT_NAME, opened, peers.peers, texts.stream, batch=asked.batch, likeness=likeness)
        stream_rows = run_stream(runs, len(texts.stream), watch=watch)
    return rows, stream_rows, failures


def _source_of(manifest: dict[str, Any]) -> str | None:
    """The recorded checkpoint: its folder while that exists, else the id that the user gave."""
    source = manifest.get("source", {})
    folder = source.get("folder")
    if folder and Path(folder).is_dir():
        return str(folder)
    name = source.get("id")
    return None if name is None else str(name)


def _threads(manifest: dict[str, Any]) -> int:
    """Threads for all: as many as the compile was told, else the physical cores; the artifact takes fewer where that was found better."""
    from hfaccel.runtime.cores import physical_cores

    wanted = manifest.get("recipe", {}).get("measure", {}).get("threads")
    return physical_cores() if wanted is None else min(int(wanted), physical_cores())


def _fresh(artifact: Path, inputs: Sequence[Any]) -> FreshProcess:
    from hfaccel.measure.fresh_process import measure_fresh_process

    return measure_fresh_process(artifact, inputs)


def _show(output: Output, rows: Sequence[Row], stream: Sequence[StreamRow], fresh: FreshProcess, context: dict[str, Any]) -> None:
    from hfaccel.cli.bench_frame import machine_title
    from hfaccel.measure.bench import COLUMNS
    from hfaccel.measure.stream import COLUMNS as STREAM_COLUMNS

    output.result(
        {
            **context,
            "rows": [row.to_json() for row in rows],
            "stream": [row.to_json() for row in stream],
            "fresh_process": asdict(fresh),
        }
    )
    machine = machine_title(context)
    if rows:
        output.table(machine, COLUMNS, [row.cells() for row in rows])
    if stream:
        title = f"stream of {stream[0].texts} texts, from text to answer; {machine}"
        output.table(title, STREAM_COLUMNS, [row.cells() for row in stream])
    for item in context["not_compared"]:
        output.line(f"{item['engine']}: {item['reason']}")
    output.line(
        f"fresh process: import {fresh.import_ms:.0f} ms, load {fresh.load_ms:.0f} ms, first answer "
        f"{fresh.first_answer_ms:.0f} ms, peak memory {fresh.peak_memory_bytes / _MEBIBYTE:.0f} MiB"
    )
    output.line(f"files: {context['size_bytes'] / _MEBIBYTE:.1f} MiB")
