"""The parts of ``hfaccel bench`` for models that generate text: against other engines, and the way to the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.cli.bench_frame import BenchRequest, bench_context, draw_plot, load_source, machine_title, stopwatch
from hfaccel.cli.bench_ladder import bench_decoder_ladder
from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from hfaccel.measure.decoding import Request
    from hfaccel.measure.peers.open import Absent
    from hfaccel.runtime.generation.model import GenerationModel

_DEFAULT_WORKLOAD = "128+128"
_CHECK_PROMPTS = 8
_TEXTS = 4
"""Whole requests of a run: the slowest engine may need ten seconds for one, and runs seven times at least."""
_MEBIBYTE = 1024 * 1024


def bench_generation_model(
    output: Output,
    asked: BenchRequest,
    against: str,
    *,
    stream: Path | None,
    ladder_requests: int | None,
    refused: Mapping[str, bool],
) -> None:
    """Time a model that generates text, as the command line asks.

    Args:
        output: where to.
        asked: what is timed.
        against: engines to compare with, as ``--against`` has them; not looked at for the ladder.
        stream: file of texts that people wrote, whose beginnings are answered as well; None: none are.
        ladder_requests: time the way to the artifact in place of engines, and at its end so many requests together.
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
    if ladder_requests is not None:
        bench_decoder_ladder(output, asked, *open_requests(asked), stream=stream, together=ladder_requests)
    else:
        _bench_engines(output, asked, against, stream)


def _bench_engines(output: Output, asked: BenchRequest, against: str, stream: Path | None) -> None:
    """Time prompts and answers of the artifact and its peers, interleaved, and show them."""
    from hfaccel.measure.generation_bench import COLUMNS, run_generation_bench
    from hfaccel.measure.generation_plot import draw_generation
    from hfaccel.measure.peers.decoders import open_decoders, parse_decoder_peers
    from hfaccel.measure.prompts import prompts_from
    from hfaccel.measure.token_engines import ArtifactEngine

    peers = parse_decoder_peers(against)
    requests, model = open_requests(asked)
    prompts: dict[Request, list[list[int]]] = {}
    if stream is not None:
        for request in requests:
            prompts[request] = [model.encode(text) for text in prompts_from(stream, model, request.prompt, most=_TEXTS)]
    context = bench_context(output, asked)
    engines = open_decoders(
        peers,
        ArtifactEngine(model.decoder),
        lambda: load_source(asked)[1].hf_model,
        threads=asked.threads,
        prompts=_check_prompts(model),
        most_tokens=max(request.prompt + request.new for request in requests),
        on_step=output.step,
    )
    for item in engines.absent:
        output.warn(f"{item.name}: {item.reason}")
    failures: list[Absent] = []
    rows = run_generation_bench(
        engines,
        requests,
        vocabulary_size=model.decoder.settings.vocabulary_size,
        watch=stopwatch(output, asked.seconds, failures),
        prompts=prompts,
    )
    not_compared = [*engines.absent, *dict.fromkeys(failures)]
    output.result({**context, "not_compared": [item.to_json() for item in not_compared], "rows": [row.to_json() for row in rows]})
    output.table(machine_title(context), COLUMNS, [row.cells() for row in rows])
    for item in not_compared:
        output.line(f"{item.name}: {item.reason}")
    output.line(f"files: {context['size_bytes'] / _MEBIBYTE:.1f} MiB")
    draw_plot(output, asked, lambda path, title: draw_generation(rows, path, title=title))


def open_requests(asked: BenchRequest) -> tuple[tuple[Request, ...], GenerationModel]:
    """The requests, and the model that can read them; the cheap checks come first."""
    from hfaccel.measure.decoding import parse_requests
    from hfaccel.measure.generation_bench import check_requests
    from hfaccel.measure.plot import check_plot_path
    from hfaccel.runtime.generation.model import GenerationModel
    from hfaccel.runtime.load import load

    requests = parse_requests((asked.workload or _DEFAULT_WORKLOAD).split(","))
    if asked.plot is not None:
        check_plot_path(asked.plot)
    model = load(asked.folder, huge_pages=asked.huge_pages)
    assert isinstance(model, GenerationModel)  # the manifest says so, and load goes by it
    check_requests(requests, model.decoder.settings.context_length)
    return requests, model


def _check_prompts(model: GenerationModel) -> list[list[int]]:
    """Token ids of real texts, none longer than the model reads."""
    from hfaccel.measure.peers.texts import packaged_texts, spread

    texts, _ = packaged_texts(model.contract)
    longest = model.decoder.settings.context_length - 1
    return [model.encode(str(text))[:longest] for text in spread(texts, _CHECK_PROMPTS)]
