"""The parts of ``hfaccel bench`` for models that generate text: against other engines, and the way to the artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from hfaccel.measure.decoding import Request
    from hfaccel.runtime.generation.model import GenerationModel

_DEFAULT_WORKLOAD = "128+128"
_CHECK_PROMPTS = 8
_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class GenerationBench:
    """The command line, checked as far as it goes without the model.

    Attributes:
        folder: the artifact.
        manifest: of the artifact.
        workload: ``prompt+new`` points separated by commas; None: the default.
        source: checkpoint to compare with; None where it is not known.
        threads: that all use.
        seconds: for each thing that is timed.
        plot: picture to draw.
        trust_remote_code: let Python code of the checkpoint run.
    """

    folder: Path
    manifest: Mapping[str, Any]
    workload: str | None
    source: str | None
    threads: int
    seconds: float
    plot: Path | None
    trust_remote_code: bool


def bench_generation_model(
    output: Output, asked: GenerationBench, against: str, *, ladder: bool, refused: Mapping[str, bool]
) -> None:
    """Time a model that generates text, as the command line asks.

    Args:
        output: where to.
        asked: what is timed.
        against: engines to compare with, as ``--against`` has them; not looked at with ``ladder``.
        ladder: time the way to the artifact in place of engines.
        refused: options that mean nothing here -> whether they were given.

    Raises:
        UsageError: options that cannot be carried out.
        SettingsError: something that the ladder needs is missing.
    """
    for option in (option for option, is_given in refused.items() if is_given):
        raise UsageError(
            "this option is for models that only read, and the folder generates text",
            where=option,
            hint="leave it out; prompt and answer are timed one by one, e.g. --workload 128+128",
        )
    if ladder:
        _bench_ladder(output, asked)
    else:
        _bench_engines(output, asked, against)


def _bench_engines(output: Output, asked: GenerationBench, against: str) -> None:
    """Time prompts and answers of the artifact and its peers, interleaved, and show them."""
    from hfaccel.measure.generation_bench import COLUMNS, run_generation_bench
    from hfaccel.measure.generation_plot import draw_generation
    from hfaccel.measure.peers.decoders import open_decoders, parse_decoder_peers
    from hfaccel.measure.peers.open import Absent, one_line
    from hfaccel.measure.token_engines import ArtifactEngine

    peers = parse_decoder_peers(against)
    requests, model = _open(asked)
    context = bench_context(output, asked)
    engines = open_decoders(
        peers,
        ArtifactEngine(model.decoder),
        lambda: _load_source(asked),
        threads=asked.threads,
        prompts=_check_prompts(model),
        on_step=output.step,
    )
    for item in engines.absent:
        output.warn(f"{item.name}: {item.reason}")
    failures: list[Absent] = []
    rows = run_generation_bench(
        engines,
        requests,
        vocabulary_size=model.decoder.settings.vocabulary_size,
        seconds=asked.seconds,
        on_step=output.step,
        on_failure=lambda name, error: failures.append(Absent(name, one_line(error))),
    )
    not_compared = [*engines.absent, *dict.fromkeys(failures)]
    output.result({**context, "not_compared": [item.to_json() for item in not_compared], "rows": [row.to_json() for row in rows]})
    output.table(machine_title(context), COLUMNS, [row.cells() for row in rows])
    for item in not_compared:
        output.line(f"{item.name}: {item.reason}")
    output.line(f"files: {context['size_bytes'] / _MEBIBYTE:.1f} MiB")
    draw_plot(output, asked, lambda path, title: draw_generation(rows, path, title=title))


def _bench_ladder(output: Output, asked: GenerationBench) -> None:
    """Time the way from transformers without a cache to the artifact, step by step, and show it."""
    from hfaccel.errors import MissingExtraError
    from hfaccel.measure.cached_stages import cached_stages
    from hfaccel.measure.generation_plot import draw_ladder
    from hfaccel.measure.ladder import COLUMNS, run_ladder
    from hfaccel.measure.ladder_decoder import DecoderWay, check_stages, decoder_rungs
    from hfaccel.measure.peers import missing_packages

    requests, model = _open(asked)
    if len(requests) != 1:
        raise UsageError("the ladder times one request", where="--workload", hint="give one, e.g. --workload 128+128")
    for package in missing_packages("torch"):
        raise MissingExtraError(package, extra="compile", needed_for="bench --ladder")
    with cached_stages(asked.manifest) as stages:
        check_stages(stages, asked.manifest, asked.folder)
        context = bench_context(output, asked)
        output.step("opening every step")
        source = _load_source(asked)
        way = DecoderWay(asked.folder, model, asked.manifest, source, stages, requests[0], asked.threads)
        rungs = decoder_rungs(way)
        output.step(f"timing {requests[0]}, {len(rungs)} steps in turn, at least 7 times: minutes where the first steps are slow")
        rows = run_ladder(rungs, new_tokens=requests[0].new, seconds=asked.seconds)
    output.result({**context, "workload": str(requests[0]), "ladder": [row.to_json() for row in rows]})
    what = f"one request: about {requests[0].prompt} tokens of text in, {requests[0].new} new tokens, greedy"
    output.table(f"{what}; {machine_title(context)}", COLUMNS, [row.cells() for row in rows])
    for row in (row for row in rows if row.note):
        output.line(f"* step {row.step}: {row.note}")
    draw_plot(output, asked, lambda path, title: draw_ladder(rows, path, title=f"{title}, {requests[0]} tokens"))


def _open(asked: GenerationBench) -> tuple[tuple[Request, ...], GenerationModel]:
    """The requests, and the model that can read them; the cheap checks come first."""
    from hfaccel.measure.decoding import parse_requests
    from hfaccel.measure.generation_bench import check_requests
    from hfaccel.measure.plot import check_plot_path
    from hfaccel.runtime.generation.model import GenerationModel
    from hfaccel.runtime.load import load

    requests = parse_requests((asked.workload or _DEFAULT_WORKLOAD).split(","))
    if asked.plot is not None:
        check_plot_path(asked.plot)
    model = load(asked.folder)
    assert isinstance(model, GenerationModel)  # the manifest says so, and load goes by it
    check_requests(requests, model.decoder.settings.context_length)
    return requests, model


def _check_prompts(model: GenerationModel) -> list[list[int]]:
    """Token ids of real texts, none longer than the model reads."""
    from hfaccel.measure.peers.texts import packaged_texts, spread

    texts, _ = packaged_texts(model.contract)
    longest = model.decoder.settings.context_length - 1
    return [model.encode(str(text))[:longest] for text in spread(texts, _CHECK_PROMPTS)]


def _load_source(asked: GenerationBench) -> Any:
    """The causal language model of transformers: float32, eval mode, attention as transformers chooses it."""
    import torch

    from hfaccel.source.resolve import resolve_source
    from hfaccel.source.torch_model import load_torch_model

    if asked.source is None:
        raise UsageError(
            "the manifest names no source checkpoint to compare with", where="--model", hint="give --model CHECKPOINT"
        )
    torch.set_num_threads(asked.threads)
    source = resolve_source(asked.source, task="text-generation", trust_remote_code=asked.trust_remote_code)
    model: Any = load_torch_model(source, attention=None)
    return model.hf_model


def bench_context(output: Output, asked: GenerationBench) -> dict[str, Any]:
    """What a reader of the numbers must know, taken before anything is timed."""
    from hfaccel.measure.host import busy_warning, host_fingerprint, load_average

    load_before = load_average()
    warnings = [warning] if (warning := busy_warning()) else []
    for warning in warnings:
        output.warn(warning)
    return {
        "artifact": str(asked.folder),
        "threads": asked.threads,
        "host": host_fingerprint(),
        "load_average": load_before,
        "warnings": warnings,
        "size_bytes": sum(int(record["size_bytes"]) for record in asked.manifest["files"]),
    }


def machine_title(context: Mapping[str, Any]) -> str:
    """What it was measured on, for the title of a table."""
    return f"{context['host']['cpu']}, {context['threads']} threads"


def draw_plot(output: Output, asked: GenerationBench, draw: Callable[[Path, str], None]) -> None:
    """Draw the picture that was asked for, if one was; ``draw`` is given its path and its title."""
    if asked.plot is not None:
        draw(asked.plot, f"{asked.folder.resolve().name}, {asked.threads} threads")
        output.info(f"picture: {asked.plot}")
