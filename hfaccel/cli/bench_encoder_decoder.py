"""The part of ``hfaccel bench`` for encoder-decoders: texts from their first token on, and sounds from samples to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hfaccel.cli.bench_frame import BenchRequest, bench_context, draw_plot, machine_title, stopwatch
from hfaccel.cli.output import Output
from hfaccel.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hfaccel.artifact.contract import Contract
    from hfaccel.measure.answer_bench import OpenAnswerer
    from hfaccel.measure.clips import Clips
    from hfaccel.measure.peers.answers import AnswerPeerName, AnswerPeers
    from hfaccel.measure.peers.open import Absent
    from hfaccel.measure.speech_bench import OpenListener, SpeechResult
    from hfaccel.runtime.generation.text_to_text import TextToTextModel
    from hfaccel.runtime.speech.model import SpeechModel

_DEFAULT_WORKLOAD = "128+32"
_ARTIFACT_NAME = "artifact"
_MEBIBYTE = 1024 * 1024


def bench_encoder_decoder(
    output: Output, asked: BenchRequest, against: str, *, data: str | None, refused: Mapping[str, bool]
) -> None:
    """Time an encoder-decoder against other engines, as the command line asks.

    Args:
        output: where to.
        asked: what is timed.
        against: engines to compare with, as ``--against`` has them.
        data: sounds, of speech models.
        refused: options that mean nothing to any encoder-decoder -> whether they were given.

    Raises:
        UsageError: options that cannot be carried out.
        DataError: the data cannot be read.
    """
    from hfaccel.measure.peers.answers import parse_answer_peers

    speech = asked.manifest["contract"]["task"] == "automatic-speech-recognition"
    _refuse(refused, "an encoder-decoder")
    if speech:
        _refuse({"--workload": asked.workload is not None, "--plot": asked.plot is not None}, "a speech model")
    elif data is not None:
        raise UsageError("the option is for speech models", where="--data", hint="give --workload SOURCE+NEW instead")
    peers = parse_answer_peers(against)
    if peers and asked.source is None:
        raise UsageError(
            "the manifest names no source checkpoint to compare with", where="--model", hint="give --model CHECKPOINT"
        )
    if not speech:
        _bench_texts(output, asked, peers)
    elif data is None:
        raise UsageError(
            "a speech model is timed on sounds, and there are none",
            where="--data",
            hint="give --data FILE: CSV or JSONL with paths of sound files in a column 'audio', and transcripts in 'text'",
        )
    else:
        _bench_speech(output, asked, peers, data)


def _refuse(options: Mapping[str, bool], kind: str) -> None:
    for option in (option for option, is_given in options.items() if is_given):
        raise UsageError(f"the option has no meaning for {kind}", where=option, hint="leave it out")


def _bench_texts(output: Output, asked: BenchRequest, names: Sequence[AnswerPeerName]) -> None:
    """Time sources and answers of the artifact and its peers, interleaved, and show them."""
    from hfaccel.measure.answer_bench import COLUMNS, OpenAnswerer, check_answer_requests, run_answer_bench
    from hfaccel.measure.answerers import ArtifactAnswers
    from hfaccel.measure.decoding import parse_requests
    from hfaccel.measure.generation_plot import draw_generation
    from hfaccel.measure.plot import check_plot_path

    requests = parse_requests((asked.workload or _DEFAULT_WORKLOAD).split(","))
    if asked.plot is not None:
        check_plot_path(asked.plot)
    model = _open_texts(asked)
    own = ArtifactAnswers(model)
    room = own.generation.context_length - len(own.encoder.start_token_ids)
    check_answer_requests(requests, own.encoder.source_length, room)
    context = bench_context(output, asked)
    failures: list[Absent] = []
    with _answerers(output, asked, names, model.contract) as opened:
        rows = run_answer_bench(
            OpenAnswerer(_ARTIFACT_NAME, own),
            opened.peers,
            requests,
            source_of=own.source,
            watch=stopwatch(output, asked.seconds, failures),
        )
    not_compared = [*opened.absent, *dict.fromkeys(failures)]
    output.result({**context, "not_compared": [item.to_json() for item in not_compared], "rows": [row.to_json() for row in rows]})
    title = f"source: up to the first new token; answer: the other new ones; greedy, one text; {machine_title(context)}"
    output.table(title, COLUMNS, [row.cells() for row in rows])
    _show_rest(output, not_compared, context)
    draw_plot(output, asked, lambda path, title: draw_generation(rows, path, title=title))


def _bench_speech(output: Output, asked: BenchRequest, names: Sequence[AnswerPeerName], data: str) -> None:
    """Let the artifact and its peers transcribe each sound in turn, and show how long it takes."""
    from hfaccel.measure.answerers import ArtifactListener
    from hfaccel.measure.clips import read_clips
    from hfaccel.measure.speech_bench import OpenListener, run_speech_bench

    model = _open_speech(asked)
    own = ArtifactListener(model)
    read = read_clips(data, own.speech)
    if read.longer:
        output.warn(f"{read.longer} sounds are longer than the encoder reads at once, and are left out")
    context = bench_context(output, asked)
    failures: list[Absent] = []
    with _listeners(output, asked, names, model.contract) as opened:
        result = run_speech_bench(
            OpenListener(_ARTIFACT_NAME, own),
            opened.peers,
            read.clips,
            {"features": own.features, "encoder": own.encoder},
            watch=stopwatch(output, asked.seconds, failures),
        )
    _show_speech(output, result, read, [*opened.absent, *failures], {**context, "data": data})


def _show_speech(
    output: Output, result: SpeechResult, read: Clips, not_compared: Sequence[Absent], context: Mapping[str, Any]
) -> None:
    from hfaccel.measure.speech_bench import COLUMNS, PART_COLUMNS

    seconds = sum(clip.seconds for clip in read.clips)
    output.result(
        {
            **context,
            "sounds": {"timed": len(read.clips), "of": read.of, "longer_left_out": read.longer, "seconds": seconds},
            "not_compared": [item.to_json() for item in not_compared],
            "rows": [row.to_json() for row in result.rows],
            "artifact_parts": [row.to_json() for row in result.parts],
            "clips": result.clips_json(read.clips),
        }
    )
    title = f"{len(read.clips)} of {read.of} sounds, {seconds:.0f} s, one after the other, greedy; {machine_title(context)}"
    output.table(title, COLUMNS, [row.cells() for row in result.rows])
    output.table("the artifact", PART_COLUMNS, [row.cells() for row in result.parts])
    if all(clip.references for clip in read.clips) and any(row.word_error_rate is None for row in result.rows):
        output.line("word error rate: jiwer is not installed (pip install jiwer)")
    _show_rest(output, not_compared, context)


def _show_rest(output: Output, not_compared: Sequence[Absent], context: Mapping[str, Any]) -> None:
    for item in not_compared:
        output.line(f"{item.name}: {item.reason}")
    output.line(f"files: {context['size_bytes'] / _MEBIBYTE:.1f} MiB")


def _open_texts(asked: BenchRequest) -> TextToTextModel:
    from hfaccel.runtime.generation.text_to_text import TextToTextModel
    from hfaccel.runtime.load import load

    model = load(asked.folder, huge_pages=asked.huge_pages)
    if not isinstance(model, TextToTextModel):
        raise _other_model(asked)
    return model


def _open_speech(asked: BenchRequest) -> SpeechModel:
    from hfaccel.runtime.load import load
    from hfaccel.runtime.speech.model import SpeechModel

    model = load(asked.folder, huge_pages=asked.huge_pages)
    if not isinstance(model, SpeechModel):
        raise _other_model(asked)
    return model


def _other_model(asked: BenchRequest) -> IntegrityError:
    return IntegrityError("the manifest's task does not fit its model", where=str(asked.folder), hint="compile it again")


def _answerers(
    output: Output, asked: BenchRequest, names: Sequence[AnswerPeerName], contract: Contract
) -> AbstractContextManager[AnswerPeers[OpenAnswerer]]:
    from hfaccel.measure.peers.answers import AnswerPeers, open_answerers

    if asked.source is None or not names:
        return nullcontext(AnswerPeers((), ()))
    return open_answerers(
        names,
        asked.source,
        contract,
        threads=asked.threads,
        trust_remote_code=asked.trust_remote_code,
        on_step=output.step,
    )


def _listeners(
    output: Output, asked: BenchRequest, names: Sequence[AnswerPeerName], contract: Contract
) -> AbstractContextManager[AnswerPeers[OpenListener]]:
    from hfaccel.measure.peers.answers import AnswerPeers, open_listeners

    if asked.source is None or not names:
        return nullcontext(AnswerPeers((), ()))
    return open_listeners(
        names,
        asked.source,
        contract,
        threads=asked.threads,
        trust_remote_code=asked.trust_remote_code,
        on_step=output.step,
    )
