"""``hfaccel bench --ladder``: the way from what people run out of the box to the artifact, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.cli.bench_frame import BenchRequest, bench_context, draw_plot, load_source, machine_title
from hfaccel.cli.output import Output
from hfaccel.errors import IntegrityError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from hfaccel.measure.decoding import Request
    from hfaccel.measure.ladder import LadderRow, LeftOut, Unit
    from hfaccel.runtime.generation.model import GenerationModel
    from hfaccel.runtime.model import Model
    from hfaccel.runtime.tokenizer import Text


_TEXTS = 8
"""That the step with guessed tokens is the mean of."""


@dataclass(frozen=True)
class _Climbed:
    """What a ladder gave: its rows, what it left out, and what was asked of each step."""

    rows: Sequence[LadderRow]
    left_out: Sequence[LeftOut]
    unit: Unit
    title: str
    plot_title: str
    request: Mapping[str, Any]


def check_ladder(against: str | None) -> None:
    """Refuse a ladder that is to be compared with engines, before anything is opened.

    Raises:
        UsageError: engines are named.
        MissingExtraError: what its first steps run in is not installed.
    """
    from hfaccel.measure.peers import missing_packages

    if against:
        raise UsageError(
            "the ladder is compared with its own steps, not with engines",
            where="--against",
            hint="leave it out; or leave --ladder out to compare engines",
        )
    for package in missing_packages("torch"):
        raise MissingExtraError(package, extra="compile", needed_for="bench --ladder")


def bench_decoder_ladder(
    output: Output,
    asked: BenchRequest,
    requests: Sequence[Request],
    model: GenerationModel,
    *,
    stream: Path | None,
    together: int,
) -> None:
    """Time the way from transformers without a key-value cache to the artifact, and show it.

    Args:
        output: where to.
        asked: what is timed.
        requests: one.
        model: the artifact, open.
        stream: file of texts that people wrote, whose beginnings are the prompts; None: everyday words, and no guessed tokens.
        together: requests that the last step answers at once; 1 leaves it out.

    Raises:
        UsageError: several requests, or no source to compare with.
        DataError: the file of texts cannot be read, or is too short.
        SettingsError: the stage cache has lost the float graphs.
    """
    from hfaccel.measure.cached_stages import cached_stages, check_stages
    from hfaccel.measure.ladder import run_ladder
    from hfaccel.measure.ladder_decoder import DecoderWay, decoder_way, python_encoder
    from hfaccel.measure.prompts import prompts_from
    from hfaccel.measure.stopwatch import Stopwatch

    if len(requests) != 1:
        raise UsageError("the ladder times one request", where="--workload", hint="give one, e.g. --workload 128+128")
    request = requests[0]
    prompts = () if stream is None else prompts_from(stream, model, request.prompt, most=max(_TEXTS, together))
    with cached_stages(asked.manifest) as stages:
        check_stages(stages, asked.manifest, asked.folder)
        context = bench_context(output, asked)
        output.step("opening every step")
        source, module = load_source(asked)
        python = python_encoder(source, asked.folder, model)
        steps = DecoderWay(
            asked.folder,
            model,
            asked.manifest,
            module.hf_model,
            stages,
            request,
            asked.threads,
            _huge_pages(asked),
            python,
            prompts,
            together,
        )
        way = decoder_way(steps)
        _say_timing(output, str(request), len(way.rungs))
        rows = run_ladder(way.rungs, amount=request.new, watch=Stopwatch(asked.seconds))
    what = f"one request: about {request.prompt} tokens of text in, {request.new} new tokens, greedy"
    asked_for = {"workload": str(request), "stream": None if stream is None else str(stream), "together": together}
    _show(output, asked, context, _Climbed(rows, way.left_out, "tokens", what, f"{request} tokens", asked_for))


def bench_encoder_ladder(
    output: Output, asked: BenchRequest, stream: Path | None, batch: int, *, refused: Mapping[str, bool]
) -> None:
    """Time the way from transformers with padding to the maximal length to the artifact, and show it.

    Args:
        output: where to.
        asked: what is timed.
        stream: file with the texts; None: the packaged sample.
        batch: texts of a batch.
        refused: options that mean nothing here -> whether they were given.

    Raises:
        UsageError: options that cannot be carried out, or no source to compare with.
        DataError: the file of texts cannot be read.
        SettingsError: the stage cache has lost the float graphs.
    """
    from hfaccel.measure.cached_stages import cached_stages, check_stages
    from hfaccel.measure.ladder import run_ladder
    from hfaccel.measure.ladder_encoder import EncoderWay, encoder_way
    from hfaccel.measure.plot import check_plot_path
    from hfaccel.measure.python_tokenizer import python_tokenizer
    from hfaccel.measure.stopwatch import Stopwatch
    from hfaccel.source.torch_model import TorchRunner

    for option in (option for option, is_given in refused.items() if is_given):
        raise UsageError(
            "the ladder of a model that reads is timed on a stream of texts, from text to answer",
            where=option,
            hint="leave it out; give your own texts with --stream FILE",
        )
    if asked.plot is not None:
        check_plot_path(asked.plot)
    with cached_stages(asked.manifest) as stages:
        check_stages(stages, asked.manifest, asked.folder)
        with output.showing_warnings():
            model = _open(asked)
        texts = _read_texts(model, stream)
        context = bench_context(output, asked)
        output.step("opening every step")
        source, module = load_source(asked)
        python = python_tokenizer(source, asked.folder, model.contract, texts)
        runner = TorchRunner(module)
        way = encoder_way(
            EncoderWay(
                asked.folder, model, asked.manifest, runner, stages, texts, batch, asked.threads, _huge_pages(asked), python
            )
        )
        _say_timing(output, f"{len(texts)} texts", len(way.rungs))
        rows = run_ladder(way.rungs, amount=len(texts), watch=Stopwatch(asked.seconds), unit="texts")
    what = f"one stream: {len(texts)} texts in batches of {batch} in given order, text in, answers out"
    request = {"stream": None if stream is None else str(stream), "texts": len(texts), "batch": batch}
    _show(output, asked, context, _Climbed(rows, way.left_out, "texts", what, f"stream of {len(texts)} texts", request))


def _open(asked: BenchRequest) -> Model:
    from hfaccel.runtime.load import load
    from hfaccel.runtime.model import Model

    model = load(asked.folder, huge_pages=asked.huge_pages)
    if not isinstance(model, Model):
        raise IntegrityError("the manifest's task does not fit its model", where=str(asked.folder), hint="compile it again")
    return model


def _huge_pages(asked: BenchRequest) -> bool:
    from hfaccel.artifact.contract import SessionSettings
    from hfaccel.runtime.load import opens_in_huge_pages

    if asked.huge_pages is not None:
        return asked.huge_pages
    return opens_in_huge_pages(asked.folder, SessionSettings.from_json(asked.manifest.get("session", {})))


def _read_texts(model: Model, stream: Path | None) -> tuple[Text, ...]:
    from hfaccel.measure.ladder_encoder import sample_texts
    from hfaccel.measure.stream import read_texts

    return sample_texts(model.contract) if stream is None else read_texts(stream, model.contract)


def _say_timing(output: Output, what: str, steps: int) -> None:
    output.step(f"timing {what}, {steps} steps in turn, at least 7 times: minutes where the first steps are slow")


def _show(output: Output, asked: BenchRequest, context: Mapping[str, Any], climbed: _Climbed) -> None:
    from hfaccel.measure.generation_plot import draw_ladder
    from hfaccel.measure.ladder import columns, notes

    rows = climbed.rows
    left_out = [item.to_json() for item in climbed.left_out]
    output.result({**context, **climbed.request, "ladder": [row.to_json() for row in rows], "left_out": left_out})
    output.table(f"{climbed.title}; {machine_title(context)}", columns(climbed.unit), [row.cells() for row in rows])
    for note in notes(rows, climbed.left_out):
        output.line(note)
    draw_plot(
        output,
        asked,
        lambda path, title: draw_ladder(rows, path, title=f"{title}, {climbed.plot_title}", left_out=climbed.left_out),
    )
