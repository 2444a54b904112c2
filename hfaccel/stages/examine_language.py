"""Examines decoders against the source: how well they predict given text, and whether a batch changes an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.errors import DataError
from hfaccel.evaluate.cached_decoding import empty_past
from hfaccel.evaluate.perplexity import (
    SHORTEST_WINDOW,
    Divergence,
    Window,
    WindowScores,
    compare_scores,
    cut_windows,
    divergence,
    explain_language,
    judge_language,
    score_window,
)
from hfaccel.runtime.session import Runner
from hfaccel.stages.examine import Finding

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.generation import GenerationSettings
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.stages.base import StageContext

WINDOW_TOKENS = 512
MOST_TOKENS = 5_000
"""Of text that every candidate reads: the source alone takes a second for some hundred of them."""
KEPT_LOGITS_BYTES = 64_000_000
"""The source's logits are kept for as many positions, spread over the text, as fit: the divergence is measured there."""
BATCH_ROWS = 3


@dataclass(frozen=True)
class _Kept:
    """The source's logits at some positions of a window."""

    positions: np.ndarray
    logits: np.ndarray


class LanguageExaminer:
    """Holds what the source says about the text, and examines one graph after the other against it.

    Args:
        source: gives the logits of all tokens.
        dataset: its texts are read in windows of at most 512 tokens, up to 5,000 tokens in all.
        tokenizer_file: ``tokenizer.json``.
        settings: of the decoder.
        ctx: of the stage: the gate's limits.
    """

    def __init__(
        self, source: Runner, dataset: Dataset, tokenizer_file: Path, settings: GenerationSettings, ctx: StageContext
    ) -> None:
        from tokenizers import Tokenizer

        self.dataset = dataset
        self._settings = settings
        self._limits = ctx.recipe.accuracy
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.no_truncation()
        texts = list(dict.fromkeys(text if isinstance(text, str) else " ".join(text) for text in dataset.texts()))
        documents = [tokenizer.encode(text).ids for text in texts[: self._limits.max_examples]]
        self._windows = _first_windows(documents, max(SHORTEST_WINDOW, min(WINDOW_TOKENS, settings.context_length)))
        if not self._windows:
            raise DataError(
                f"no text has {SHORTEST_WINDOW} tokens or more",
                where=dataset.name,
                hint="give running text, best some thousand words",
            )
        every = self._every()
        self._source: list[WindowScores] = []
        self._kept: list[_Kept] = []
        for window, logits in _logits(source, self._windows, settings):
            self._source.append(score_window(logits, window))
            positions = np.arange(0, len(window.ids) - 1, every)
            self._kept.append(_Kept(positions, logits[positions].copy()))

    def examine(self, runner: Runner) -> Finding:
        """Read the text with a graph that gives the logits of all tokens, and judge it."""
        scores: list[WindowScores] = []
        divergences: list[Divergence] = []
        for (window, logits), kept in zip(_logits(runner, self._windows, self._settings), self._kept, strict=True):
            scores.append(score_window(logits, window))
            divergences.append(divergence(kept.logits, logits[kept.positions]))
        loss = compare_scores(self._source, scores, divergences)
        verdict = judge_language(loss, self._limits)
        invariance = self._batch_cosine(runner)
        if not verdict.passed:
            return Finding(verdict, invariance, verdict.reason, explain_language(loss, self._limits))
        if invariance < self._limits.batch_invariance:
            asked = self._limits.batch_invariance
            detail = f"a prompt alone and in a batch: cosine {invariance:.4f} of the logits, at least {asked} is asked"
            return Finding(verdict, invariance, "batch-variant", detail)
        return Finding(verdict, invariance, None, "")

    def _every(self) -> int:
        """Of how many positions one is kept."""
        positions = sum(len(window.ids) - 1 for window in self._windows)
        room = max(1, KEPT_LOGITS_BYTES // (4 * self._settings.vocabulary_size))
        return max(1, -(-positions // room))

    def _batch_cosine(self, runner: Runner) -> float:
        """Smallest cosine between the logits of a prompt alone and among prompts of other lengths, at its last token."""
        texts = [list(window.ids) for window in self._windows[:BATCH_ROWS]]
        prompts = [ids[: max(2, len(ids) // (2 + number))] for number, ids in enumerate(texts)]
        together = _prefill(runner, prompts, self._settings)
        worst = 1.0
        for row, prompt in enumerate(prompts):
            alone = _prefill(runner, [prompt], self._settings)[0, len(prompt) - 1].astype(np.float64)
            among = together[row, len(prompt) - 1].astype(np.float64)
            worst = min(worst, float(alone @ among / (np.linalg.norm(alone) * np.linalg.norm(among))))
        return worst


def _first_windows(documents: Sequence[Sequence[int]], length: int) -> list[Window]:
    """Windows of the documents from the first on, as many as together have no more than the most tokens, and at least one."""
    windows: list[Window] = []
    tokens = 0
    for window in cut_windows(documents, length=length):
        tokens += len(window.ids)
        if windows and tokens > MOST_TOKENS:
            break
        windows.append(window)
    return windows


def _logits(runner: Runner, windows: Sequence[Window], settings: GenerationSettings) -> Iterator[tuple[Window, np.ndarray]]:
    """Logits [tokens, vocabulary] of each window."""
    for window in windows:
        yield window, _prefill(runner, [list(window.ids)], settings)[0]


def _prefill(runner: Runner, rows: Sequence[Sequence[int]], settings: GenerationSettings) -> np.ndarray:
    """Logits [batch, sequence, vocabulary] of prompts padded on the right."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), settings.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.ascontiguousarray(positions)}
    return runner.run({**feeds, **empty_past(len(rows), settings)})["logits"]
