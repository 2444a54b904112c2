"""Which tokens an encoder-decoder may choose: the rules of its checkpoint, in the order in which transformers applies them.

Reference: ``_get_logits_processor`` of ``transformers.generation``, version 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hfaccel.artifact.generation import EncoderSettings, GenerationSettings
from hfaccel.runtime.generation.option_checks import ABOVE_ZERO, check_count, check_number
from hfaccel.runtime.generation.sampling import penalize_repetition

Hook = Callable[[Sequence[Sequence[int]], np.ndarray], np.ndarray]
"""A rule of one kind of model, behind all others: takes the new tokens of each row so far and its logits, and gives logits."""

_NEVER = np.float32(-np.inf)


@dataclass(frozen=True)
class TokenRules:
    """What may be chosen. New tokens are those behind what the decoder was given to begin with.

    Attributes:
        end_token_ids: any of them ends an answer.
        repetition_penalty: above 1 makes tokens less likely that a row has already, what it began with included.
        no_repeat_ngram_size: so many tokens in a row may not come twice, what it began with included; 0 allows it.
        min_new_tokens: before so many new tokens no answer ends.
        forced_first_token_id: first new token; None leaves it to the model.
        forced_last_token_id: last new token of an answer that has as many as it may have; None leaves it to the model.
        suppressed_token_ids: never chosen.
        suppressed_first_token_ids: not chosen as the first token that is not forced.

    Raises:
        UsageError: a value that its option cannot have.
    """

    end_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    forced_first_token_id: int | None = None
    forced_last_token_id: int | None = None
    suppressed_token_ids: tuple[int, ...] = ()
    suppressed_first_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_count("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, "give a number of tokens, or 0 to allow repetition")
        check_count("min_new_tokens", self.min_new_tokens, 0, "give a number of tokens, or 0 to let an answer end at once")
        check_number("repetition_penalty", self.repetition_penalty, ABOVE_ZERO, "1 changes nothing, 1.1 is usual")

    def apply(self, scores: np.ndarray, rows: Sequence[Sequence[int]], new: Sequence[int], rooms: Sequence[int]) -> np.ndarray:
        """Scores with the rules applied; those given stay as they are.

        Args:
            scores: float32 [batch, vocabulary]: logits, or their logarithmic softmax.
            rows: token ids of each row so far, what it began with included.
            new: how many of these are new, for each row.
            rooms: most new tokens of each row.
        """
        ruled = penalize_repetition(scores, rows, self.repetition_penalty) if self.repetition_penalty != 1 else scores.copy()
        suppressed, suppressed_first, ends = (
            list(ids) for ids in (self.suppressed_token_ids, self.suppressed_first_token_ids, self.end_token_ids)
        )
        first_free = 0 if self.forced_first_token_id is None else 1
        for row, ids, count, room in zip(ruled, rows, new, rooms, strict=True):
            if self.no_repeat_ngram_size:
                row[_completing(ids, self.no_repeat_ngram_size)] = _NEVER
            if count < self.min_new_tokens:
                row[ends] = _NEVER
            if count == 0:
                _force(row, self.forced_first_token_id)
            if count == room - 1:
                _force(row, self.forced_last_token_id)
            row[suppressed] = _NEVER
            if count == first_free:
                row[suppressed_first] = _NEVER
        return ruled


def rules_of(
    settings: GenerationSettings,
    *,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    min_new_tokens: int | None = None,
) -> TokenRules:
    """The rules of a checkpoint; what is None is as it advises.

    Raises:
        UsageError: a value that its option cannot have.
    """
    defaults, encoder = settings.defaults, settings.encoder or EncoderSettings(source_length=1, start_token_ids=())
    return TokenRules(
        end_token_ids=settings.end_token_ids,
        repetition_penalty=defaults.repetition_penalty if repetition_penalty is None else repetition_penalty,
        no_repeat_ngram_size=defaults.no_repeat_ngram_size if no_repeat_ngram_size is None else no_repeat_ngram_size,
        min_new_tokens=defaults.min_new_tokens if min_new_tokens is None else min_new_tokens,
        forced_first_token_id=encoder.forced_first_token_id,
        forced_last_token_id=encoder.forced_last_token_id,
        suppressed_token_ids=encoder.suppressed_token_ids,
        suppressed_first_token_ids=encoder.suppressed_first_token_ids,
    )


def rooms_of(rows: Sequence[Sequence[int]], max_new_tokens: int, context_length: int) -> list[int]:
    """Most new tokens of each row, so that none grows longer than the model reads."""
    return [min(max_new_tokens, context_length - len(row)) for row in rows]


def _completing(ids: Sequence[int], size: int) -> np.ndarray:
    """Tokens that would complete so many in a row which are there already."""
    if len(ids) < size:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids, dtype=np.int64), size)
    same = (windows[:, :-1] == np.asarray(ids[len(ids) - size + 1 :], dtype=np.int64)).all(axis=1)
    completing: np.ndarray = windows[same, -1]
    return completing


def _force(row: np.ndarray, token: int | None) -> None:
    if token is not None:
        row.fill(_NEVER)
        row[token] = 0
