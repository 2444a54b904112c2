"""Texts (or sounds) as padded batches: for calibration, and for measuring sensitivity where there is no calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.evaluate.cached_decoding import POSITION_IDS, empty_past
from hfaccel.evaluate.example import Example
from hfaccel.evaluate.teacher_forcing import AnswerReader
from hfaccel.runtime.batching import pad, plan_batches
from hfaccel.runtime.tokenizer import Encoded, TextTokenizer

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract
    from hfaccel.artifact.generation import GenerationSettings
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.quant.calibration import Feeds
    from hfaccel.stages.base import StageContext

CALIBRATION_BATCH = 8
CALIBRATION_TOKENS = 1024
"""Tokens of a batch: every activation of the graph is an output then, 0.25 MB a token for BERT-base."""
UNKNOWN_SHARE = 0.3
"""Of its tokens that a text may have unknown to the tokenizer."""


def calibration_batches(ctx: StageContext) -> list[Feeds]:
    """Calibration texts as padded batches of similar length, in random order; empty when there are none.

    Of an encoder-decoder what its encoder reads: texts, or windows of sound, one by one.
    """
    return _batches(ctx.calibration, ctx)


def data_batches(dataset: Dataset, ctx: StageContext) -> list[Feeds]:
    """The first inputs of evaluation data as one padded batch; labels are not looked at."""
    return _batches([example.model_input for example in dataset.examples[:CALIBRATION_BATCH]], ctx)


def _batches(texts: Sequence[Any], ctx: StageContext) -> list[Feeds]:
    if not texts:
        return []
    contract = ctx.artifacts["export"].contract
    if contract.generation is not None and contract.generation.encoder is not None:
        return _source_batches(texts, contract, ctx)
    tokenizer = TextTokenizer(ctx.artifacts["export"].folder, contract.text)
    encoded = mostly_known(tokenizer.encode(texts), tokenizer.unknown_id)
    order = _in_random_order([len(item.ids) for item in encoded], CALIBRATION_BATCH, ctx)
    batches: list[Feeds] = [pad([encoded[index] for index in batch], contract.text) for batch in order]
    return batches if contract.generation is None else [_with_empty_past(feeds, contract.generation) for feeds in batches]


def _source_batches(sources: Sequence[Any], contract: Contract, ctx: StageContext) -> list[Feeds]:
    reader = AnswerReader(ctx.artifacts["export"].folder, contract)
    examples = [example for source in sources if reader.can_read(example := Example(source))]
    speech = reader.encoder.speech is not None  # a window has as many values as a batch of texts
    lengths = [max(1, reader.source_length(example)) for example in examples]
    order = _in_random_order(lengths, 1 if speech else CALIBRATION_BATCH, ctx)
    return [reader.source_feeds([examples[index] for index in batch]) for batch in order]


def _in_random_order(lengths: Sequence[int], max_batch: int, ctx: StageContext) -> list[list[int]]:
    """Places of texts of so many tokens, batch by batch."""
    order = plan_batches(lengths, max_batch=max_batch, max_tokens=CALIBRATION_TOKENS)
    np.random.default_rng(ctx.recipe.seed).shuffle(order)
    return order


def mostly_known(encoded: Sequence[Encoded], unknown_id: int | None) -> Sequence[Encoded]:
    """Those of whose words the tokenizer knows most: packaged texts say nothing to a model of another language. All, if none is."""
    if unknown_id is None:
        return encoded
    known = [item for item in encoded if np.mean(item.ids == unknown_id) <= UNKNOWN_SHARE]
    return known or encoded


def _with_empty_past(feeds: Feeds, settings: GenerationSettings) -> Feeds:
    batch, width = feeds["input_ids"].shape
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(width, dtype=np.int64), (batch, width)))
    return {**feeds, POSITION_IDS: positions, **empty_past(batch, settings)}
