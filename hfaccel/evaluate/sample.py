"""The packaged sample: what models are compared on when the user gives no data."""

from __future__ import annotations

from importlib.resources import files
from itertools import combinations

from hfaccel.evaluate.dataset import Dataset, digest
from hfaccel.evaluate.example import Example

# Scripts that are written without spaces between sentences.
_UNSPACED = ("zh", "ja", "th")


def multilingual_sample() -> Dataset:
    """Unlabelled texts in 23 languages: each sentence alone, and each two sentences of a language together.

    Agreement of 99 % cannot be shown with fewer than 299 texts even when none disagrees, so the sentences are also combined.
    """
    examples: list[Example] = []
    for line in files("hfaccel.evaluate").joinpath("data/sample.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        language, *sentences = line.split("|")
        joiner = "" if language in _UNSPACED else " "
        texts = [*sentences, *(joiner.join(pair) for pair in combinations(sentences, 2))]
        examples += [Example(text=text, slice=language) for text in texts]
    return Dataset(
        "multilingual sample",
        tuple(examples),
        labelled=False,
        sha256=digest(examples),
        multilingual_sample=True,
        slice_column="language",
    )
