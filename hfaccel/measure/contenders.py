"""What is timed: a model made ready for the points of a workload, and models that compute batches exactly as they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.errors import UsageError
from hfaccel.measure.bench import Contender
from hfaccel.measure.workload import Point, make_feeds, make_texts
from hfaccel.runtime.batching import pad
from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import Encoded, Text, TextTokenizer

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract, TextSettings
    from hfaccel.measure.likeness import Likeness
    from hfaccel.runtime.session import Runner

_QUESTION = "what is the story about"
_PAIR_TASKS = ("question-answering", "text-ranking")


class GivenOrder(Model):
    """A model that computes each batch as one run, padded to its longest text: neither sorted by length nor split.

    That is how other engines are used. Tokenizer and answers are the artifact's own, so that only engines are compared.

    Args:
        runner: computes the raw outputs of a padded batch.
        tokenizer: made with ``contract.text``.
        contract: what the numbers mean.
        pad_to: tokens that every text is padded to, at least those of the longest; None: as many as the batch's longest has.
    """

    def __init__(self, runner: Runner, tokenizer: TextTokenizer, contract: Contract, *, pad_to: int | None = None) -> None:
        super().__init__(runner, tokenizer, contract)
        self._pad_to = pad_to

    def _stream(self, encoded: Sequence[Encoded], max_batch: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        settings = self.contract.text
        for start in range(0, len(encoded), max_batch):
            batch = encoded[start : start + max_batch]
            longest = max(item.ids.size for item in batch)
            width = max(longest, self._pad_to or 0)
            feeds = pad(batch, settings)
            arrays = self.runner.run(feeds if width == longest else widened(feeds, width, settings))
            for row, item in enumerate(batch):
                first = width - item.ids.size if settings.padding_side == "left" else 0
                own = slice(first, first + item.ids.size)
                cut = {name: array[row, own] if name in self._token_level else array[row] for name, array in arrays.items()}
                yield start + row, cut


def widened(feeds: Mapping[str, np.ndarray], width: int, settings: TextSettings) -> dict[str, np.ndarray]:
    """Inputs of a batch, int64 [batch, sequence], with more padding: [batch, width], on the side that ``settings`` names."""
    fill = {"input_ids": settings.pad_token_id, "token_type_ids": settings.pad_token_type_id}
    more = {name: width - array.shape[1] for name, array in feeds.items()}
    sides = {name: (0, count) if settings.padding_side == "right" else (count, 0) for name, count in more.items()}
    return {name: np.pad(array, ((0, 0), sides[name]), constant_values=fill.get(name, 0)) for name, array in feeds.items()}


def check_lengths(points: Sequence[Point], contract: Contract) -> None:
    """Refuse points that are longer than the model can read.

    Raises:
        UsageError: a sequence is longer than the contract's ``max_length``.
    """
    limit = contract.text.max_length
    for point in points:
        if point.sequence > limit:
            raise UsageError(
                f"{point} is longer than the {limit} tokens that the model reads",
                where="--workload",
                hint=f"use lengths up to {limit}",
            )


def without_cache(model: Model, folder: Path) -> Model:
    """The same model with a tokenizer that remembers no text, so that repeated runs pay for tokenizing each time.

    Args:
        model: an open model.
        folder: where its ``tokenizer.json`` lies.
    """
    return Model(model.runner, TextTokenizer(folder / "tokenizer.json", model.contract.text, cache_size=0), model.contract)


def contender(name: str, model: Model, *, likeness: Likeness | None = None, seed: int = 0) -> Contender:
    """Make a model ready for timing; models with the same tokenizer and seed are given the same inputs.

    Args:
        name: how reports call it.
        model: a model whose tokenizer has no cache, see :func:`without_cache`.
        likeness: how far its answers are the source's.
        seed: of the inputs.
    """

    def graph_only(point: Point) -> Callable[[], None]:
        # Ids up to the highest that real texts use are valid whatever size the embedding table has.
        highest = max(int(item.ids.max()) for item in model.tokenizer.encode(example_inputs(model, point, seed=seed)))
        feeds = make_feeds(point, model.runner.input_names, vocabulary_size=highest + 1, seed=seed)

        def run() -> None:
            model.runner.run(feeds)

        return run

    def end_to_end(point: Point) -> Callable[[], None]:
        texts: list[Any] = example_inputs(model, point, seed=seed)

        def run() -> None:
            model(texts, max_batch=point.batch)

        return run

    return Contender(name, graph_only, end_to_end, likeness)


def example_inputs(model: Model, point: Point, *, seed: int) -> list[Text]:
    """Inputs of the model's task, each about ``point.sequence`` tokens long, special tokens and question included."""
    contract = model.contract

    def count_tokens(text: str) -> int:
        return int(model.tokenizer.encode([complete(text, contract)])[0].ids.size)

    return [complete(text, contract) for text in make_texts(point, count_tokens, seed=seed)]


def complete(text: str, contract: Contract) -> Text:
    """A text as the task reads it: with a question before it where it reads pairs, with a mask where it fills one."""
    if contract.task in _PAIR_TASKS:
        return (_QUESTION, text)
    mask = contract.text.mask_token
    if contract.task == "fill-mask" and mask is not None and mask not in text:
        return f"{mask} {text}"
    return text
