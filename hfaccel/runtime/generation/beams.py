"""Beam search: several beginnings of an answer go on side by side, and the best one that has ended is the answer.

The algorithm is that of Graves, "Sequence Transduction with Recurrent Neural Networks" (arXiv:1211.3711), with the length penalty
as transformers has it: the sum of the logarithmic probabilities is divided by the length of the answer to the power of
``length_penalty`` (Wu et al., "Google's Neural Machine Translation System", arXiv:1609.08144, divide by another function of the
length). When to stop, and which of the candidates count, is as in ``_beam_search`` of ``transformers.generation``, version 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hfaccel.runtime.generation.answering import check_room
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.memory import Memory
from hfaccel.runtime.generation.option_checks import Range, check_count, check_flag, check_number
from hfaccel.runtime.generation.rules import Hook, TokenRules, rooms_of

_OUT = np.float32(-1e9)
"""Worse than any sum of logarithmic probabilities: the score of what must not be gone on with."""
_LENGTH_PENALTIES = Range("from -10 to 10", -10, 10)
"""Lengths to a higher power are more than a float32 holds."""


@dataclass(frozen=True)
class BeamSettings:
    """How to search.

    Attributes:
        beams: beginnings of an answer that go on side by side.
        max_new_tokens: most tokens of an answer.
        length_penalty: power of the length that scores are divided by: above 0 favours long answers, below 0 short ones.
        early_stopping: stop as soon as as many answers as beams have ended; else go on while a better one seems possible.

    Raises:
        UsageError: a value that its option cannot have.
    """

    beams: int
    max_new_tokens: int = 256
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        check_count("num_beams", self.beams, 1, "1 searches no beams")
        check_count("max_new_tokens", self.max_new_tokens, 1, "give how many tokens the answer may have at most")
        check_number("length_penalty", self.length_penalty, _LENGTH_PENALTIES, "1 is usual, 0 lets the length be")
        check_flag("early_stopping", self.early_stopping, "True stops as soon as as many answers as beams have ended")


def search_beams(
    model: EncoderDecoder,
    memory: Memory,
    rows: Sequence[Sequence[int]],
    settings: BeamSettings,
    rules: TokenRules,
    hook: Hook | None = None,
) -> list[list[int]]:
    """The best answer that the search finds for each source.

    Sources do not meet: each is searched as if it were alone, and costs nothing any more once its search has ended.

    Args:
        model: reads the tokens.
        memory: of the sources, one per row.
        rows: what each answer begins with.
        settings: how to search.
        rules: what may be chosen; applied to logarithmic probabilities.
        hook: applied behind the rules.

    Returns:
        The new token ids of each row; an end token is the last one.

    Raises:
        DataError: rows that cannot be read, or that leave no room for an answer.
    """
    return [ids for ids, _ in score_beams(model, memory, rows, settings, rules, hook)]


def score_beams(
    model: EncoderDecoder,
    memory: Memory,
    rows: Sequence[Sequence[int]],
    settings: BeamSettings,
    rules: TokenRules,
    hook: Hook | None = None,
) -> list[tuple[list[int], float]]:
    """As :func:`search_beams`, each answer with its score: the sum of logarithmic probabilities, divided as ``length_penalty`` says."""
    check_room(rows, model.settings.context_length)
    rooms = rooms_of(rows, settings.max_new_tokens, model.settings.context_length)
    decoding = model.prefill(memory, rows, room=max(rooms))
    decoding.reorder([row for row in range(len(rows)) for _ in range(settings.beams)])
    searches = [_Search(settings, frozenset(rules.end_token_ids), room) for room in rooms]
    open_rows = list(range(len(rows)))
    while True:
        starts = [len(rows[row]) for row in open_rows for _ in range(settings.beams)]
        new = [ids[start:] for ids, start in zip(decoding.tokens, starts, strict=True)]
        scores = _log_softmax(decoding.logits)
        room_of_each = [rooms[row] for row in open_rows for _ in range(settings.beams)]
        scores = rules.apply(scores, decoding.tokens, [len(ids) for ids in new], room_of_each)
        if hook is not None:
            scores = hook(new, scores)
        parents: list[int] = []
        chosen: list[int] = []
        for place, row in enumerate(open_rows):
            own = slice(place * settings.beams, (place + 1) * settings.beams)
            beams, tokens = searches[row].advance(scores[own], new[own])
            if searches[row].is_open:
                parents += [own.start + beam for beam in beams]
                chosen += tokens
        open_rows = [row for row in open_rows if searches[row].is_open]
        if not open_rows:
            return [search.best() for search in searches]
        decoding.reorder(parents)
        decoding.step(np.array(chosen, dtype=np.int64))


class _Search:
    """The beams of one source."""

    def __init__(self, settings: BeamSettings, end_token_ids: frozenset[int], room: int) -> None:
        self.is_open = True
        self._settings = settings
        self._end_token_ids = end_token_ids
        self._room = room
        # All beams begin alike: only the first may go on, else all of them would do the same for ever.
        self._running = np.full(settings.beams, _OUT, dtype=np.float32)
        self._running[0] = 0
        self._ended: list[tuple[np.float32, list[int]]] = []
        # A beam has at most one candidate per end token, so that among these there are enough that go on.
        self._candidates = max(2, 1 + len(end_token_ids)) * settings.beams

    def advance(self, scores: np.ndarray, new: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Take one token for every beam.

        Args:
            scores: float32 [beams, vocabulary], of the next token.
            new: new tokens of each beam so far.

        Returns:
            For each beam that goes on the beam that it comes from and its token, the best first.
        """
        vocabulary = scores.shape[1]
        sums = (scores + self._running[:, None]).reshape(-1)
        best = _largest(sums, self._candidates)
        candidates, parents, tokens = sums[best], best // vocabulary, best % vocabulary
        length = len(new[0]) + 1
        ends = np.array([token in self._end_token_ids or length >= self._room for token in tokens.tolist()])
        weight = np.float32(length**self._settings.length_penalty)
        # What has ended counts only among the best: the others are there to go on in their stead.
        for place in np.flatnonzero(ends[: self._settings.beams]):
            score = np.float32(candidates[place] / weight)
            if score > _OUT:
                self._ended.append((score, [*new[parents[place]], int(tokens[place])]))
        self._ended = sorted(self._ended, key=lambda ended: -ended[0])[: self._settings.beams]
        going = candidates + np.where(ends, _OUT, np.float32(0))
        kept = _largest(going, self._settings.beams)
        self._running = going[kept]
        self.is_open = length < self._room and self._may_improve(weight)
        return parents[kept].tolist(), tokens[kept].tolist()

    def best(self) -> tuple[list[int], float]:
        """The answer with the highest score, and that score."""
        return (self._ended[0][1], float(self._ended[0][0])) if self._ended else ([], 0.0)

    def _may_improve(self, weight: np.float32) -> bool:
        if len(self._ended) < self._settings.beams:
            return True
        return not self._settings.early_stopping and bool(self._running[0] / weight > self._ended[-1][0])


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values, in descending order; of equal ones the earlier first."""
    count = min(count, values.size)
    threshold = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= threshold)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
