"""Prompts of a given length from texts that people wrote: what an answer repeats depends on the text, so word salad will not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.errors import DataError
from hfaccel.measure.workload import longest_fit

if TYPE_CHECKING:
    from hfaccel.runtime.generation.model import GenerationModel


def prompts_from(path: Path, model: GenerationModel, length: int, *, most: int) -> tuple[str, ...]:
    """The beginnings of the first texts of a file, each of about ``length`` tokens.

    Args:
        path: as :func:`hfaccel.measure.stream.read_texts` reads it.
        model: counts tokens.
        length: tokens of a prompt, at most.
        most: how many prompts.

    Raises:
        DataError: the file cannot be read, or all its texts together are shorter than one prompt.
    """
    from hfaccel.measure.stream import read_texts

    texts = [str(text) for text in read_texts(path, model.contract)]
    found = [prompt for prompt, _ in zip(_cut(texts, length, lambda text: len(model.encode(text))), range(most), strict=False)]
    if not found:
        raise DataError(
            f"all texts together have fewer than the {length} tokens of one prompt",
            where=str(path),
            hint="give longer texts, or a shorter prompt with --workload",
        )
    return tuple(found)


def _cut(texts: Sequence[str], length: int, count_tokens: Callable[[str], int]) -> Iterator[str]:
    """Whole words, as many as fit; a text that is too short goes on with the next one."""
    words: list[str] = []
    for text in texts:
        words += text.split()
        if count_tokens(" ".join(words)) >= length:
            yield " ".join(words[: longest_fit(words, length, count_tokens)])
            words = []
