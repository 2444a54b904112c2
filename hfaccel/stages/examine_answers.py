"""Examines encoder-decoders against the source: how well they predict given answers, and how good their own answers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.errors import DataError
from hfaccel.evaluate.example import Example
from hfaccel.evaluate.metrics import resolve_metric
from hfaccel.evaluate.perplexity import (
    Divergence,
    WindowScores,
    compare_scores,
    divergence,
    score_window,
)
from hfaccel.evaluate.teacher_forcing import AnswerReader, ForcedAnswer, own_answers
from hfaccel.runtime.session import Runner
from hfaccel.stages.own_answers import Answers, AnswersFinding, OwnAnswers, finding_of

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.contract import Contract
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.stages.base import StageContext

SOURCE_TOKENS_PER_TOKEN = 4
"""Of the texts before answers at most, for each token of answers: the encoder reads a token several times as fast as the decoder with its
vocabulary."""
MOST_SOUNDS = 100
"""Each costs a run of the encoder over a whole window."""
MOST_OWN_ANSWERS = 64
"""Examples without a reference that the source answers first, without a cache."""
MOST_WRITTEN = 100
"""Examples that every candidate answers itself, token by token."""
KEPT_LOGITS_BYTES = 64_000_000
"""The source's logits are kept for as many positions, spread over the answers, as fit: the divergence is measured there."""
BATCH_ROWS = 3


@dataclass(frozen=True)
class _Kept:
    """The source's logits at some positions of an answer."""

    positions: np.ndarray
    logits: np.ndarray


class AnswersExaminer:
    """Holds what the source says about the answers, and examines one graph after the other against it.

    Read are the reference answers, of several the first; where the data has none, the answers that the source gives itself. Each
    example counts as a text of its own. Sounds that are longer than the encoder's window are left out.

    Args:
        source: gives ``logits`` of all tokens for the source's inputs and ``decoder_input_ids``.
        dataset: sources, with or without references.
        tokenizer_folder: holds ``tokenizer.json``.
        contract: of the graphs.
        ctx: of the stage: the gate's limits, the metric, the seed.
        source_answers: writes the source's own answers; None leaves the task's metric out.

    Raises:
        DataError: no example can be read at once, or the references are empty.
        SettingsError: the metric does not fit the task.
    """

    def __init__(
        self,
        source: Runner,
        dataset: Dataset,
        tokenizer_folder: Path,
        contract: Contract,
        ctx: StageContext,
        *,
        source_answers: Answers | None = None,
    ) -> None:
        self.dataset = dataset
        self._limits = ctx.recipe.accuracy
        metric = resolve_metric(ctx.metric, contract.task, None)
        self._reader = AnswerReader(tokenizer_folder, contract)
        self._forced = self._force_answers(source)
        every = self._every()
        self._source: list[WindowScores] = []
        self._kept: list[_Kept] = []
        for forced, logits in self._logits(source):
            window = forced.window
            self._source.append(score_window(logits, window))
            positions = np.arange(window.first - 1, len(window.ids) - 1, every)
            self._kept.append(_Kept(positions, logits[positions].copy()))
        self._own: OwnAnswers | None = None
        if dataset.labelled and source_answers is not None:
            written = dataset.examples[:MOST_WRITTEN]
            self._own = OwnAnswers(metric, written, source_answers, self._limits, seed=ctx.recipe.seed)

    def examine(self, runner: Runner, *, answers: Answers | None = None) -> AnswersFinding:
        """Read the answers with a graph that gives the logits of all tokens, and judge it.

        Args:
            runner: encoder and decoder together.
            answers: writes the candidate's own answers; None leaves the task's metric out.
        """
        scores: list[WindowScores] = []
        divergences: list[Divergence] = []
        for (forced, logits), kept in zip(self._logits(runner), self._kept, strict=True):
            scores.append(score_window(logits, forced.window))
            divergences.append(divergence(kept.logits, logits[kept.positions]))
        loss = compare_scores(self._source, scores, divergences)
        known = self._own if loss.non_finite == 0 else None
        written = known.loss(answers) if known is not None and answers is not None else None
        return finding_of(loss, written, self._batch_cosine(runner), self._limits, what="an answer")

    def _force_answers(self, source: Runner) -> list[ForcedAnswer]:
        reader, labelled = self._reader, self.dataset.labelled
        most = self._limits.max_examples if labelled else MOST_OWN_ANSWERS
        if reader.encoder.speech is not None:
            most = min(most, MOST_SOUNDS)
        examples = [example for example in _spread(self.dataset.examples, most) if reader.can_read(example)]
        if not examples:
            raise DataError(
                "every sound is longer than what the encoder reads at once",
                where=self.dataset.name,
                hint=f"cut the recordings into sentences, of at most {self._window_seconds()} seconds",
            )
        starts = reader.starts(source, examples)
        if labelled:
            answers = [reader.answer_ids(example.answers[0]) for example in examples]
        else:
            answers = own_answers(source, reader, examples, starts)
        forced: list[ForcedAnswer] = []
        tokens = source_tokens = 0
        for number, (example, start, answer) in enumerate(zip(examples, starts, answers, strict=True)):
            item = reader.force(number, example, start, answer)
            tokens += len(item.window.ids)
            source_tokens += reader.source_length(example)
            if forced and max(tokens, source_tokens / SOURCE_TOKENS_PER_TOKEN) > self._limits.max_tokens:
                break
            forced.append(item)
        return forced

    def _window_seconds(self) -> int:
        speech = self._reader.encoder.speech
        return speech.window_seconds if speech is not None else 0

    def _every(self) -> int:
        """Of how many positions one is kept."""
        positions = sum(len(forced.window.ids) for forced in self._forced)
        room = max(1, KEPT_LOGITS_BYTES // (4 * self._reader.generation.vocabulary_size))
        return max(1, -(-positions // room))

    def _logits(self, runner: Runner) -> Iterator[tuple[ForcedAnswer, np.ndarray]]:
        """Logits [tokens, vocabulary] of each answer."""
        for forced in self._forced:
            yield forced, self._reader.logits(runner, [forced.example], [forced.window.ids])[0]

    def _batch_cosine(self, runner: Runner) -> float:
        """Smallest cosine between the logits of an answer alone and among others, at its last token."""
        forced = self._forced[:BATCH_ROWS]
        examples, rows = [item.example for item in forced], [item.window.ids for item in forced]
        together = self._reader.logits(runner, examples, rows)
        worst = 1.0
        for place, (example, row) in enumerate(zip(examples, rows, strict=True)):
            alone = self._reader.logits(runner, [example], [row])[0, -1].astype(np.float64)
            among = together[place, len(row) - 1].astype(np.float64)
            worst = min(worst, float(alone @ among / (np.linalg.norm(alone) * np.linalg.norm(among))))
        return worst


def _spread(examples: Sequence[Example], most: int) -> list[Example]:
    """As many as may be, from all over the data: samples are sorted by language."""
    count = min(len(examples), most)
    return [examples[index * len(examples) // count] for index in range(count)]
