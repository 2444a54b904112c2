"""``hfaccel run``: answers of a compiled folder, like the transformers pipeline of the same task."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from hfaccel.runtime.generation.model import GenerationModel
    from hfaccel.runtime.generation.text_to_text import TextToTextModel
    from hfaccel.runtime.model import Model
    from hfaccel.runtime.speech.model import SpeechModel

_SHOWN_VALUES = 6
_STRATEGIES = ("none", "simple", "first", "average", "max")


def run(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that hfaccel compile made.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT...",
            help="Texts; for text-ranking the query, then the documents; for speech recognition sound files.",
            show_default=False,
        ),
    ] = None,
    pair: Annotated[str | None, typer.Option(help="Second text, for models that read pairs.")] = None,
    question: Annotated[str | None, typer.Option(help="Question to answer; needs --context.")] = None,
    context: Annotated[str | None, typer.Option(help="Text that holds the answer.")] = None,
    file: Annotated[str | None, typer.Option(help="File with one text per line; - reads standard input.")] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="How many answers (labels, fillings, spans); for text generation tokens in the draw."),
    ] = None,
    aggregation: Annotated[str, typer.Option(help="How tokens become entities: none, simple, first, average, max.")] = "none",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Text generation: longest answer in tokens, default 256.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Text generation: show the answer while it grows.")] = False,
    system: Annotated[str | None, typer.Option(help="Text generation: system message of the conversation.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Text generation: go on with the text as it is, without chat template.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Text generation: draw tokens with this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Text generation: share of the probability in the draw.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Text generation: least share of the likeliest token's probability.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Text generation: above 1 against repetition.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text generation: text that ends the answer; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Text generation, speech: repeats the draws.")] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Text generation: tokens of a single answer guessed in a step at most, default 8; 0 guesses none."
        ),
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Encoder-decoders: beginnings of an answer that go on side by side.")
    ] = None,
    source_language: Annotated[
        str | None, typer.Option(help="Translation from many languages: what the texts are in, e.g. eng_Latn or en_XX.")
    ] = None,
    target_language: Annotated[
        str | None, typer.Option(help="Translation into many languages: what the answers shall be in, e.g. fra_Latn or fr_XX.")
    ] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Speech: segments with their times.")] = False,
    language: Annotated[str | None, typer.Option(help="Speech: code of what is spoken, e.g. de; heard if not given.")] = None,
    translate: Annotated[bool, typer.Option("--translate", help="Speech: English text of another language.")] = False,
    temperatures: Annotated[
        str | None,
        typer.Option(help="Speech: tried until an answer is good, e.g. 0,0.2,0.4; as usual for long recordings, 0 tries once."),
    ] = None,
    compression_ratio_threshold: Annotated[
        float | None, typer.Option(help="Speech: above it an answer repeats itself and is tried again; usually 1.35.")
    ] = None,
    logprob_threshold: Annotated[
        float | None, typer.Option(help="Speech: below it an answer is unlikely and is tried again; usually -1.")
    ] = None,
    no_speech_threshold: Annotated[
        float | None, typer.Option(help="Speech: an unlikely answer is silence where that is likelier than this; usually 0.6.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default as many as the compile found best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Run texts through a compiled model; needs no torch and no transformers.

    Examples: hfaccel run OUT "Why is the sky blue?" --stream; hfaccel run OUT talk.wav --timestamps
    """
    output = Output(as_json=as_json)
    given = _given(texts, file, pair, question, context, aggregation)

    from hfaccel.runtime.load import load  # onnxruntime is slow to import, --help does without

    with output.showing_warnings():
        # Huge pages make up for their time after some hundred tokens.
        model = load(folder, threads=threads, huge_pages=None if len(given) > 1 else False)
    drawing = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop) if stop else None,
        "seed": seed,
    }
    hearing = {
        "timestamps": timestamps or None,
        "language": language,
        "task": "translate" if translate else None,
        "temperatures": None if temperatures is None else _numbers(temperatures),
        "compression_ratio_threshold": compression_ratio_threshold,
        "logprob_threshold": logprob_threshold,
        "no_speech_threshold": no_speech_threshold,
    }
    wishes = _Wishes(
        given,
        pair,
        question,
        context,
        top_k,
        aggregation,
        stream,
        system,
        raw,
        prompt_lookup_num_tokens,
        drawing=_present(drawing),
        hearing=_present(hearing),
        beams=_present({"num_beams": num_beams}),
        languages=_present({"source_language": source_language, "target_language": target_language}),
    )
    _show(output, model, wishes)


@dataclass(frozen=True)
class _Wishes:
    """What the command line asks of a model.

    Attributes:
        given: texts, or sound files.
        pair: as the option.
        question: as the option.
        context: as the option.
        top_k: as the option.
        aggregation: as the option.
        stream: as the option.
        system: as the option.
        raw: as the option.
        prompt_lookup_num_tokens: as the option.
        drawing: options of how tokens are chosen that were given.
        hearing: options of speech that were given.
        beams: options of beams that were given.
        languages: options of translation that were given.
    """

    given: list[str]
    pair: str | None
    question: str | None
    context: str | None
    top_k: int | None
    aggregation: str
    stream: bool
    system: str | None
    raw: bool
    prompt_lookup_num_tokens: int | None
    drawing: Mapping[str, Any]
    hearing: Mapping[str, Any]
    beams: Mapping[str, Any]
    languages: Mapping[str, Any]

    @property
    def draws(self) -> dict[str, Any]:
        """How tokens are chosen, ``top_k`` being one of the ways."""
        return {**self.drawing, **_present({"top_k": self.top_k})}

    @property
    def of_decoders(self) -> dict[str, bool]:
        """Options of decoders, and whether they were given."""
        guesses = self.prompt_lookup_num_tokens is not None
        return {"--system": self.system is not None, "--raw": self.raw, "--prompt-lookup-num-tokens": guesses}

    @property
    def of_reading(self) -> dict[str, bool]:
        """Options of models that only read, and whether they were given."""
        return {
            "--pair": self.pair is not None,
            "--question": self.question is not None,
            "--aggregation": self.aggregation != "none",
        }


def _given(
    texts: list[str] | None, file: str | None, pair: str | None, question: str | None, context: str | None, aggregation: str
) -> list[str]:
    """The texts, those of the file behind the others; options that do not go together are refused."""
    if aggregation not in _STRATEGIES:
        raise UsageError(f"unknown strategy '{aggregation}'", where="--aggregation", hint=f"one of {', '.join(_STRATEGIES)}")
    given = [*(texts or []), *(_lines(file) if file else [])]
    if (question is None) != (context is None):
        raise UsageError("--question and --context go together", where="--context" if context is None else "--question")
    if question is None and not given:
        raise UsageError("there is nothing to run", hint='give texts, --file FILE, or --question "..." --context "..."')
    if question is not None and (given or pair is not None):
        raise UsageError("--question and --context go without other texts", where="--question")
    return given


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"'{text}' is no list of numbers", where="--temperatures", hint="separate them by commas: 0,0.2,0.4"
        ) from None


def _present(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _show(output: Output, model: Model | GenerationModel | TextToTextModel | SpeechModel, wishes: _Wishes) -> None:
    """Run what was given through the model, after what it would ignore was refused."""
    from hfaccel.cli.answers import show_answers, show_transcripts
    from hfaccel.cli.generation import show_generation
    from hfaccel.runtime.generation.model import GenerationModel
    from hfaccel.runtime.generation.text_to_text import TextToTextModel
    from hfaccel.runtime.model import Model

    reading, chat, drawing, hearing = wishes.of_reading, wishes.of_decoders, wishes.drawing, wishes.hearing
    beams, languages = wishes.beams, wishes.languages
    if isinstance(model, GenerationModel):
        _refuse(reading | _options({**hearing, **beams, **languages}), model)
        options = {**wishes.draws, **_present({"prompt_lookup_num_tokens": wishes.prompt_lookup_num_tokens})}
        show_generation(output, model, wishes.given, options, system=wishes.system, raw=wishes.raw, stream=wishes.stream)
    elif isinstance(model, TextToTextModel):
        _refuse(reading | chat | _options(hearing), model)
        show_answers(output, model, wishes.given, {**wishes.draws, **beams, **languages}, stream=wishes.stream)
    elif isinstance(model, Model):
        _refuse(chat | _options({**drawing, **hearing, **beams, **languages}) | {"--stream": wishes.stream}, model)
        _show_reading(output, model, wishes)
    else:
        shared = {name: value for name, value in drawing.items() if name in ("max_new_tokens", "seed")}
        others = {name: value for name, value in drawing.items() if name not in shared}
        _refuse(reading | chat | _options({**others, **languages}) | {"--top-k": wishes.top_k is not None}, model)
        show_transcripts(output, model, wishes.given, {**hearing, **shared, **beams}, stream=wishes.stream)


def _show_reading(output: Output, model: Model, wishes: _Wishes) -> None:
    """Answers of a model that only reads."""
    _check_task(model.contract.task, wishes.pair, wishes.question, wishes.top_k, wishes.aggregation)
    if model.contract.task == "sentence-similarity":
        _show_vectors(output, wishes.given, model.embed(wishes.given))
    elif model.contract.task == "text-ranking" and wishes.pair is None:
        _show_ranking(output, wishes.given, model)
    else:
        inputs = _inputs(wishes.given, wishes.pair, wishes.question, wishes.context)
        _show_answers(output, inputs, _answers(model, inputs, wishes.top_k, wishes.aggregation), model.contract.task)


def _options(wishes: Mapping[str, Any]) -> dict[str, bool]:
    """The command line's names of what was given."""
    names = {"task": "translate"}
    return {"--" + names.get(name, name).replace("_", "-"): True for name in wishes}


def _refuse(options: Mapping[str, bool], model: Model | GenerationModel | TextToTextModel | SpeechModel) -> None:
    """Options that would be ignored."""
    for option, given in options.items():
        if given:
            raise UsageError(f"the option has no meaning for {model.contract.task}", where=option)


def _check_task(task: str, pair: str | None, question: str | None, top_k: int | None, aggregation: str) -> None:
    """Refuse options that would be ignored; those of the answers themselves are refused by the model."""
    if (task == "question-answering") != (question is not None):
        raise UsageError(
            f"this model was compiled for {task}",
            where="--question",
            hint='use --question "..." --context "..."' if question is None else "give it texts instead",
        )
    ignored = {"--pair": pair is not None, "--top-k": top_k is not None, "--aggregation": aggregation != "none"}
    if task == "text-ranking":
        ignored.pop("--pair")
    for option, given in ignored.items():
        if given and task in ("sentence-similarity", "text-ranking"):
            raise UsageError(f"the option has no meaning for {task}", where=option)


def _lines(file: str) -> list[str]:
    try:
        content = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the file cannot be read: {error}", where=file, hint="it must be UTF-8 with one text per line"
        ) from error
    lines = [line for line in content.splitlines() if line.strip()]
    if not lines:
        raise DataError("the file has no text", where=file, hint="write one text per line")
    return lines


def _inputs(texts: list[str], pair: str | None, question: str | None, context: str | None) -> list[str | tuple[str, str]]:
    if question is not None and context is not None:
        return [(question, context)]
    return [text if pair is None else (text, pair) for text in texts]


def _answers(model: Model, inputs: list[str | tuple[str, str]], top_k: int | None, aggregation: Any) -> list[Any]:
    answers = model(inputs, top_k="default" if top_k is None else top_k, aggregation_strategy=aggregation)
    # The pipelines of these tasks give a list of one input without its list.
    unwrapped = len(inputs) == 1 and model.contract.task in ("fill-mask", "question-answering")
    return [answers] if unwrapped else list(answers)


def _show_answers(output: Output, inputs: list[str | tuple[str, str]], answers: list[Any], task: str) -> None:
    output.result(answers)
    for text, answer in zip(inputs, answers, strict=True):
        output.line(text if isinstance(text, str) else " | ".join(text))
        if task == "feature-extraction":
            hidden = answer[0]
            output.line(f"  {len(hidden)} tokens x {len(hidden[0])} values, first token {_values(hidden[0])}")
        else:
            _show_rows(output, answer)


def _show_rows(output: Output, answer: Any) -> None:
    """One answer, a list of them, or (several masks) a list of lists, as tables."""
    if isinstance(answer, list) and answer and isinstance(answer[0], list):
        for item in answer:
            _show_rows(output, item)
        return
    rows = answer if isinstance(answer, list) else [answer]
    if not rows:
        output.line("  (nothing found)")
        return
    columns = list(rows[0])
    output.table("", columns, [[_cell(row[name]) for name in columns] for row in rows])


def _show_ranking(output: Output, texts: list[str], model: Model) -> None:
    if len(texts) < 2:
        raise UsageError("text-ranking needs a query and at least one document", hint="the first text is the query")
    ranked = model.rank(texts[0], texts[1:])
    output.result(ranked)
    rows = [[_cell(item["score"]), item["index"], texts[1 + item["index"]]] for item in ranked]
    output.table(texts[0], ["score", "index", "document"], rows)


def _show_vectors(output: Output, texts: list[str], embeddings: np.ndarray) -> None:
    from hfaccel.runtime.heads.sentence_similarity import cosines

    result: dict[str, Any] = {"embeddings": embeddings.tolist()}
    for text, vector in zip(texts, result["embeddings"], strict=True):
        output.line(f"{text}\n  {len(vector)} values {_values(vector)}")
    if len(texts) > 1:
        table = cosines(embeddings).tolist()
        result["cosines"] = table
        numbers = [str(number) for number in range(1, len(texts) + 1)]
        rows = [
            [number, *(f"{value:.3f}" for value in row), text] for number, row, text in zip(numbers, table, texts, strict=True)
        ]
        output.table("cosine", ["", *numbers, "text"], rows)
    output.result(result)


def _values(vector: list[float]) -> str:
    shown = ", ".join(f"{value:.4f}" for value in vector[:_SHOWN_VALUES])
    return f"[{shown}{', ...' if len(vector) > _SHOWN_VALUES else ''}]"


def _cell(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value
