"""The part of ``hfaccel run`` for encoder-decoders: texts or sound files in, text out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hfaccel.cli.generation import show_pieces
from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from hfaccel.runtime.generation.text_to_text import TextToTextModel
    from hfaccel.runtime.speech.model import SpeechModel
    from hfaccel.runtime.speech.transcript import Transcript


def show_answers(
    output: Output, model: TextToTextModel, texts: Sequence[str], options: Mapping[str, Any], *, stream: bool
) -> None:
    """Answer each text.

    Args:
        output: where to.
        model: answers.
        texts: at least one.
        options: of ``model.generate``.
        stream: show a single answer while it grows.
    """
    if stream:
        _check_single(output, texts)
        pieces = model.generate(texts[0], **options, stream=True)
        show_pieces(output, pieces, lambda text: int(model.tokenizer.encode([text])[0].ids.size))
        return
    answers = model.generate(list(texts), **options)
    output.result([{"text": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)])
    for text, answer in zip(texts, answers, strict=True):
        output.line(f"{text}\n{answer}\n" if len(texts) > 1 else answer)


def show_transcripts(
    output: Output, model: SpeechModel, files: Sequence[str], options: Mapping[str, Any], *, stream: bool
) -> None:
    """Write down what is said in each file.

    Args:
        output: where to.
        model: listens.
        files: at least one.
        options: of ``model.transcribe``.
        stream: show the text of a single file while it grows.
    """
    if stream:
        _check_single(output, files)
        start = time.monotonic()
        for piece in model.transcribe(files[0], **options, stream=True):
            output.piece(piece if isinstance(piece, str) else f"{_times(piece)} {piece.text}\n")
        output.piece("\n")
        seconds, sound_seconds = time.monotonic() - start, _duration(files[0])
        output.info(f"{sound_seconds:.1f} s of sound in {seconds:.2f} s: real-time factor {seconds / sound_seconds:.3f}")
        return
    transcripts: list[Transcript] = model.transcribe(list(files), **options)
    output.result([{"file": file, **asdict(item)} for file, item in zip(files, transcripts, strict=True)])
    for file, transcript in zip(files, transcripts, strict=True):
        if len(files) > 1:
            output.line(file)
        for segment in transcript.segments:
            output.line(f"{_times(segment)} {segment.text}")
        if not transcript.segments:
            output.line(transcript.text)


def _duration(file: str) -> float:
    """Seconds of sound in a file that was read before."""
    import soundfile

    return float(soundfile.info(file).duration)


def _check_single(output: Output, inputs: Sequence[str]) -> None:
    if len(inputs) > 1 or output.as_json:
        raise UsageError("--stream shows a single answer as it grows", where="--stream", hint="leave it out")


def _times(segment: Any) -> str:
    return f"[{segment.start_seconds:7.2f} - {segment.end_seconds:7.2f}]"
