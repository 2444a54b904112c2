"""The packaged texts: what models are compared on, and calibrated on, when the user gives no data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import combinations, permutations

from hfaccel.artifact.contract import Task
from hfaccel.evaluate.dataset import Dataset, digest
from hfaccel.evaluate.example import Example, TextInput

# Scripts that are written without spaces between sentences.
_UNSPACED = ("zh", "ja", "th")
_PAIRED: tuple[Task, ...] = ("question-answering", "text-ranking")
"""Tasks whose models read two texts together."""


def multilingual_sample(task: Task | None = None) -> Dataset:
    """Unlabelled texts in 23 languages, or passages of many kinds for models that generate text.

    Args:
        task: models of some tasks read two texts, and those that generate text take every token of a text for an example: passages,
            most of them in English. On short sentences in languages that a model does not know (SmolLM2: perplexity 142) the loss
            would be that of guesses.
    """
    examples = tuple(_passage_examples() if task == "text-generation" else _sentence_examples(task))
    return Dataset(
        "multilingual sample",
        examples,
        labelled=False,
        sha256=digest(examples),
        multilingual_sample=True,
        slice_column="language",
    )


def calibration_texts(task: Task | None = None) -> tuple[TextInput, ...]:
    """Texts of many kinds and languages, none of them in the sample that models are compared on.

    Args:
        task: models of some tasks read two texts: each text with the one after it.
    """
    texts = [text for _, text in _passages("calibration.txt")]
    return tuple(zip(texts, [*texts[1:], texts[0]], strict=True)) if task in _PAIRED else tuple(texts)


def _passage_examples() -> Iterator[Example]:
    for language, text in _passages("passages.txt"):
        yield Example(text=text, slice=language)


def _sentence_examples(task: Task | None) -> Iterator[Example]:
    """Each sentence alone, and each two sentences of a language together, or as a pair where models read two texts.

    Agreement of 99 % cannot be shown with fewer than 299 texts even when none disagrees, so the sentences are also combined.
    """
    for language, *sentences in _lines("sample.txt"):
        if task in _PAIRED:
            for first, second in permutations(sentences, 2):
                yield _paired(task, first, second, language)
            continue
        joiner = "" if language in _UNSPACED else " "
        for text in (*sentences, *(joiner.join(pair) for pair in combinations(sentences, 2))):
            yield Example(text=text, slice=language)


def _paired(task: Task | None, first: str, second: str, language: str) -> Example:
    if task == "question-answering":
        return Example(text=first, context=second, slice=language)
    return Example(text=(first, second), slice=language)


def _passages(name: str) -> Iterator[tuple[str, str]]:
    """Language and text of each line of a packaged file, with line breaks where it has backslash and n."""
    for language, text in _lines(name, separators=1):
        yield language, text.replace("\\n", "\n")


def _lines(name: str, *, separators: int = -1) -> Iterator[Sequence[str]]:
    """The parts of each line of a packaged file, comments left out."""
    for line in files("hfaccel.evaluate").joinpath(f"data/{name}").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line.split("|", separators)
