"""One example of evaluation data, the same shape for every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TextInput = str | tuple[str, str]


@dataclass(frozen=True)
class Example:
    """One example; which fields are filled depends on the task.

    Attributes:
        text: the text, a pair that the model reads together or (sentence-similarity) one after the other, the query and the
            document (text-ranking), the question (question-answering), the words joined by spaces (token-classification), the
            source (text2text-generation), running text or a prompt (text-generation), the path of a sound file
            (automatic-speech-recognition).
        label: the reference, None when unlabelled: label id, tuple of label ids (multi-label), number (regression, similarity and
            relevance scores), tuple with one tag per word (token-classification). Label names stay names where the labels of the
            model are not known.
        words: the words that carry tags (token-classification).
        word_spans: start and end character of each word in ``text``.
        context: the passage that holds the answer (question-answering).
        answers: accepted answers; empty when the question has none (question-answering) or the data states none
            (text-generation, text2text-generation, automatic-speech-recognition).
        slice: which part of the data it belongs to, for example its language; None where the data does not say.
    """

    text: TextInput
    label: Any = None
    words: tuple[str, ...] | None = None
    word_spans: tuple[tuple[int, int], ...] = ()
    context: str | None = None
    answers: tuple[str, ...] = ()
    slice: str | None = None

    @property
    def model_input(self) -> TextInput:
        """What the model reads: a text or a pair; question and context for question-answering."""
        if self.context is not None:
            return (str(self.text), self.context)
        return self.text
