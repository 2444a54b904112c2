"""``hfaccel run``: answers of a compiled folder, like the transformers pipeline of the same task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from hfaccel.runtime.generation.model import GenerationModel
    from hfaccel.runtime.model import Model

_SHOWN_VALUES = 6
_STRATEGIES = ("none", "simple", "first", "average", "max")


def run(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that hfaccel compile made.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT...", help="Texts; for text-ranking the query, then the documents.", show_default=False),
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
    seed: Annotated[int | None, typer.Option(help="Text generation: repeats the draws.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Run texts through a compiled model; needs no torch and no transformers.

    Example: hfaccel run OUT "Why is the sky blue?" --stream
    """
    output = Output(as_json=as_json)
    if aggregation not in _STRATEGIES:
        raise UsageError(f"unknown strategy '{aggregation}'", where="--aggregation", hint=f"one of {', '.join(_STRATEGIES)}")
    given = [*(texts or []), *(_lines(file) if file else [])]
    if (question is None) != (context is None):
        raise UsageError("--question and --context go together", where="--context" if context is None else "--question")
    if question is None and not given:
        raise UsageError("there is nothing to run", hint='give texts, --file FILE, or --question "..." --context "..."')
    if question is not None and (given or pair is not None):
        raise UsageError("--question and --context go without other texts", where="--question")

    from hfaccel.cli.generation import show_generation
    from hfaccel.runtime.generation.model import GenerationModel
    from hfaccel.runtime.load import load  # onnxruntime is slow to import, --help does without

    with output.showing_warnings():
        model = load(folder)
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop) if stop else None,
        "seed": seed,
    }
    wishes = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(model, GenerationModel):
        _refuse({"--pair": pair is not None, "--question": question is not None, "--aggregation": aggregation != "none"}, model)
        if top_k is not None:
            wishes["top_k"] = top_k
        show_generation(output, model, given, wishes, system=system, raw=raw, stream=stream)
        return
    _refuse(
        {"--" + name.replace("_", "-"): True for name in wishes}
        | {"--stream": stream, "--system": system is not None, "--raw": raw},
        model,
    )
    _check_task(model.contract.task, pair, question, top_k, aggregation)
    if model.contract.task == "sentence-similarity":
        _show_vectors(output, given, model.embed(given))
    elif model.contract.task == "text-ranking" and pair is None:
        _show_ranking(output, given, model)
    else:
        inputs = _inputs(given, pair, question, context)
        _show_answers(output, inputs, _answers(model, inputs, top_k, aggregation), model.contract.task)


def _refuse(options: Mapping[str, bool], model: Model | GenerationModel) -> None:
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
