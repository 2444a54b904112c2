"""Examines decoders against the source: how well they predict given text, how good their own answers are, what a batch changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.errors import DataError
from hfaccel.evaluate.cached_decoding import MANY_ROWS_LOGITS, PromptThenSteps, empty_past, open_with_all_logits
from hfaccel.evaluate.greedy_paths import PathPrompt
from hfaccel.evaluate.metrics import resolve_metric
from hfaccel.evaluate.perplexity import (
    SHORTEST_WINDOW,
    Divergence,
    LanguageLoss,
    Window,
    WindowScores,
    compare_scores,
    cut_windows,
    divergence,
    score_window,
)
from hfaccel.evaluate.prompted import PromptReader
from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME
from hfaccel.runtime.session import Runner
from hfaccel.runtime.tokenizer import open_tokenizer
from hfaccel.stages.own_answers import Answers, AnswersFinding, OwnAnswers, finding_of
from hfaccel.stages.shipping import written_by

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.contract import Contract
    from hfaccel.artifact.generation import GenerationSettings
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.evaluate.example import Example
    from hfaccel.recipe.schema import AccuracySection
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate

WINDOW_TOKENS = 512
BRIEF_TOKENS = 1_000
"""Of text that the float graph reads: that it is the source has been proved before, and reading all would take as long as the source."""
KEPT_LOGITS_BYTES = 64_000_000
"""The source's logits are kept for as many positions, spread over the text, as fit: the divergence is measured there."""
BATCH_ROWS = 3
BATCH_TOKENS = 96
"""Of the longest prompt that is read alone and among others: what a batch changes shows in a few, and longer ones cost seconds."""
MOST_WRITTEN = 100
MOST_WRITTEN_TOKENS = 4_000
"""Of the answers that every candidate writes itself, which float graphs do no faster than some hundred in a second."""
PATHS = 8
LONGEST_PATH_PROMPT = 64


@dataclass(frozen=True)
class _Kept:
    """The source's logits at some positions of a window."""

    positions: np.ndarray
    logits: np.ndarray


class LanguageExaminer:
    """Holds what the source says about the text, and examines one graph after the other against it.

    Text without expected answers is read in windows of at most 512 tokens. Where the data has prompts with expected answers, each
    prompt is read with its answer, only the answers' tokens are scored, and every candidate answers the prompts itself. The recipe
    says how many tokens are read in all (``accuracy.max_tokens``): the source alone takes a second for some hundred of them.

    Args:
        source: gives the logits of all tokens.
        dataset: texts, or prompts with answers.
        tokenizer_folder: holds ``tokenizer.json`` and the chat template.
        settings: of the decoder.
        ctx: of the stage: the gate's limits, the metric, the seed.
        source_answers: writes the source's own answers; None leaves the task's metric out.

    Raises:
        DataError: no text is long enough, or no prompt with its answer is short enough.
        SettingsError: the metric does not fit the task.
    """

    def __init__(
        self,
        source: Runner,
        dataset: Dataset,
        tokenizer_folder: Path,
        settings: GenerationSettings,
        ctx: StageContext,
        *,
        source_answers: Answers | None = None,
    ) -> None:
        self.dataset = dataset
        self._settings = settings
        self._limits = ctx.recipe.accuracy
        self._own: OwnAnswers | None = None
        longest = max(SHORTEST_WINDOW, min(WINDOW_TOKENS, settings.context_length))
        if dataset.labelled:
            reader = PromptReader(tokenizer_folder)
            longest_prompt = min(longest, settings.context_length - 1)
            self._windows, examples = _prompted_windows(reader, dataset, longest_prompt, self._limits.max_tokens)
            if source_answers is not None:
                metric = resolve_metric(ctx.metric, "text-generation", None)
                count = min(MOST_WRITTEN, MOST_WRITTEN_TOKENS // reader.limits(examples).max_new_tokens)
                self._own = OwnAnswers(metric, examples[:count], source_answers, self._limits, seed=ctx.recipe.seed)
        else:
            self._windows = _text_windows(dataset, tokenizer_folder, longest, self._limits)
        every = self._every()
        self._source: list[WindowScores] = []
        self._kept: list[_Kept] = []
        for window, logits in _logits(source, self._windows, settings):
            self._source.append(score_window(logits, window))
            positions = np.arange(window.first - 1, len(window.ids) - 1, every)
            self._kept.append(_Kept(positions, logits[positions].copy()))

    def examine_candidate(
        self, candidate: Candidate, graph: Path, contract: Contract, ctx: StageContext, *, brief: bool = False
    ) -> AnswersFinding:
        """Open a candidate's graph, with the one for prompts if that lies beside it, and :meth:`examine` it.

        Args:
            candidate: says how it is opened, and how many bits its steps have.
            graph: its path.
            contract: of the graph.
            ctx: of the stage.
            brief: as for :meth:`examine`.
        """
        runner, path = open_with_all_logits(graph, contract, candidate.session), graph.with_name(PROMPT_GRAPH_NAME)
        prompts = open_with_all_logits(path, contract, candidate.session) if path.is_file() else None
        coarser = candidate.precision == "int4"  # prompts have 8 bits
        answers = written_by(graph, candidate.session, contract, ctx)
        return self.examine(runner, prompts=prompts, steps_are_coarser=coarser, answers=answers, brief=brief)

    def examine(
        self,
        runner: Runner,
        *,
        prompts: Runner | None = None,
        steps_are_coarser: bool = False,
        answers: Answers | None = None,
        brief: bool = False,
    ) -> AnswersFinding:
        """Read the text with a graph that gives the logits of all tokens, and judge it.

        Args:
            runner: the graph.
            prompts: one beside it that reads prompts; then each text is read by both, one after the other.
            steps_are_coarser: the graph has fewer bits than the one for prompts, and reads most of each text.
            answers: writes the candidate's own answers; None leaves the task's metric out.
            brief: read only the first windows: the graph is known to be the source.
        """
        windows = _up_to(self._windows, BRIEF_TOKENS) if brief else self._windows
        reader = (
            runner if prompts is None else PromptThenSteps(prompts, runner, self._settings, steps_are_coarser=steps_are_coarser)
        )
        loss, many_rows = self._losses(reader, windows)
        known = self._own if loss.non_finite == 0 else None
        written = known.loss(answers) if known is not None and answers is not None else None
        worst = min(self._batch_cosine(graph) for graph in (runner, prompts) if graph is not None)
        finding = finding_of(loss, written, worst, self._limits, what="a prompt")
        return finding if many_rows is None or many_rows.non_finite else replace(finding, many_rows=many_rows.as_loss())

    def _losses(self, reader: Runner, windows: Sequence[Window]) -> tuple[LanguageLoss, LanguageLoss | None]:
        """What is lost as the graphs are used for one row, and, where there are two, for many."""
        scores: dict[str, list[WindowScores]] = {}
        divergences: dict[str, list[Divergence]] = {}
        for window, kept in zip(windows, self._kept[: len(windows)], strict=True):
            found = _read(reader, [list(window.ids)], self._settings)
            for name in {"logits", MANY_ROWS_LOGITS} & found.keys():
                scores.setdefault(name, []).append(score_window(found[name][0], window))
                divergences.setdefault(name, []).append(divergence(kept.logits, found[name][0][kept.positions]))
        source = self._source[: len(windows)]
        losses = {name: compare_scores(source, scores[name], divergences[name]) for name in scores}
        return losses["logits"], losses.get(MANY_ROWS_LOGITS)

    def path_prompts(self) -> list[PathPrompt]:
        """At most 8 beginnings for the models to continue, of as many texts as there are: a prompt, or the start of a window."""
        first: dict[int, Window] = {}
        for window in self._windows:
            first.setdefault(window.cluster, window)
        others = [window for window in self._windows if window is not first[window.cluster]]
        order = [*_spread(list(first.values()), PATHS), *_spread(others, PATHS)][:PATHS]
        most = max(1, self._settings.context_length // 2)
        lengths = [item.first if self.dataset.labelled else min(LONGEST_PATH_PROMPT, len(item.ids) // 2) for item in order]
        return [PathPrompt(item.ids[: min(most, length)], item.cluster) for item, length in zip(order, lengths, strict=True)]

    def _every(self) -> int:
        """Of how many positions one is kept."""
        positions = sum(len(window.ids) - window.first for window in self._windows)
        room = max(1, KEPT_LOGITS_BYTES // (4 * self._settings.vocabulary_size))
        return max(1, -(-positions // room))

    def _batch_cosine(self, runner: Runner) -> float:
        """Smallest cosine between the logits of a prompt alone and among prompts of other lengths, at its last token."""
        texts = [list(window.ids) for window in self._windows[:BATCH_ROWS]]
        prompts = [
            ids[: max(2, min(len(ids) // (2 + number), 2 * BATCH_TOKENS // (2 + number)))] for number, ids in enumerate(texts)
        ]
        together = _prefill(runner, prompts, self._settings)
        worst = 1.0
        for row, prompt in enumerate(prompts):
            alone = _prefill(runner, [prompt], self._settings)[0, len(prompt) - 1].astype(np.float64)
            among = together[row, len(prompt) - 1].astype(np.float64)
            worst = min(worst, float(alone @ among / (np.linalg.norm(alone) * np.linalg.norm(among))))
        return worst


def _text_windows(dataset: Dataset, tokenizer_folder: Path, longest: int, limits: AccuracySection) -> list[Window]:
    tokenizer = open_tokenizer(tokenizer_folder / "tokenizer.json")
    texts = list(dict.fromkeys(text if isinstance(text, str) else " ".join(text) for text in dataset.texts()))
    read = [tokenizer.encode(text).ids for text in texts[: limits.max_examples]]
    windows = _up_to(cut_windows(read, length=longest), limits.max_tokens)
    if not windows:
        raise DataError(
            f"no text has {SHORTEST_WINDOW} tokens or more",
            where=dataset.name,
            hint="give running text, best some thousand words",
        )
    return windows


def _prompted_windows(
    reader: PromptReader, dataset: Dataset, longest: int, max_tokens: int
) -> tuple[list[Window], list[Example]]:
    """Prompts with their answers and the examples that they are of, without those that are longer than the model should read."""
    read = [(reader.window(number, example), example) for number, example in enumerate(dataset.examples)]
    fitting = [(window, example) for window, example in read if len(window.ids) <= longest]
    if not fitting:
        raise DataError(
            f"every prompt has more than {longest} tokens with its answer",
            where=dataset.name,
            hint="give shorter prompts, or running text without answers",
        )
    return _up_to([window for window, _ in fitting], max_tokens), [example for _, example in fitting]


def _spread(windows: Sequence[Window], most: int) -> list[Window]:
    count = min(len(windows), most)
    return [windows[number * len(windows) // count] for number in range(count)]


def _up_to(windows: Sequence[Window], most_tokens: int) -> list[Window]:
    """The first windows, as many as together have no more than so many tokens, and at least one."""
    ends = np.cumsum([len(window.ids) for window in windows])
    return list(windows[: max(1, int(np.searchsorted(ends, most_tokens, side="right")))])


def _logits(runner: Runner, windows: Sequence[Window], settings: GenerationSettings) -> Iterator[tuple[Window, np.ndarray]]:
    """Logits [tokens, vocabulary] of each window."""
    for window in windows:
        yield window, _prefill(runner, [list(window.ids)], settings)[0]


def _prefill(runner: Runner, rows: Sequence[Sequence[int]], settings: GenerationSettings) -> np.ndarray:
    """Logits [batch, sequence, vocabulary] of prompts padded on the right."""
    return _read(runner, rows, settings)["logits"]


def _read(runner: Runner, rows: Sequence[Sequence[int]], settings: GenerationSettings) -> dict[str, np.ndarray]:
    """All that a graph gives for prompts padded on the right."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), settings.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.ascontiguousarray(positions)}
    return runner.run({**feeds, **empty_past(len(rows), settings, runner)})
