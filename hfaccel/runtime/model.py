"""A compiled model: texts in, answers out, as the transformers pipeline of the same task gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hfaccel.artifact.contract import Contract, Task
from hfaccel.errors import DataError, UsageError
from hfaccel.runtime.batching import pad, plan_batches
from hfaccel.runtime.heads.feature_extraction import features
from hfaccel.runtime.heads.fill_mask import fill_masks
from hfaccel.runtime.heads.question_answering import best_spans
from hfaccel.runtime.heads.sentence_similarity import vectors
from hfaccel.runtime.heads.text_classification import best_label, label_scores, top_labels
from hfaccel.runtime.heads.text_ranking import ranking, relevance
from hfaccel.runtime.heads.token_classification import AggregationStrategy, entities
from hfaccel.runtime.session import Runner
from hfaccel.runtime.tokenizer import Encoded, Text, TextTokenizer

Input = str | tuple[str, str] | Mapping[str, str]
TopK = int | Literal["default"] | None

# Lengths that question-answering pipelines use unless told otherwise.
_QA_WINDOW_TOKENS = 384
_QA_STRIDE_TOKENS = 128
# One logit per vocabulary entry and token: 8 texts of 128 tokens are 125 MB, 32 would be half a gigabyte.
_FILL_MASK_BATCH = 8


@dataclass(frozen=True)
class _Options:
    """Options of a call; those that another task owns must keep their defaults."""

    top_k: TopK = "default"
    aggregation_strategy: AggregationStrategy = "none"
    ignore_labels: tuple[str, ...] = ("O",)
    max_answer_len: int = 15
    handle_impossible_answer: bool = False


_DEFAULTS = _Options()
_OPTION_TASKS: Mapping[str, tuple[Task, ...]] = {
    "top_k": ("text-classification", "fill-mask", "question-answering"),
    "aggregation_strategy": ("token-classification",),
    "ignore_labels": ("token-classification",),
    "max_answer_len": ("question-answering",),
    "handle_impossible_answer": ("question-answering",),
}


class Model:
    """A runner with its tokenizer and its contract. May be shared by threads when its runner may.

    Args:
        runner: computes the raw outputs of a padded batch.
        tokenizer: made with ``contract.text``.
        contract: what the numbers mean.
    """

    def __init__(self, runner: Runner, tokenizer: TextTokenizer, contract: Contract) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.contract = contract
        self._token_level = frozenset(spec.name for spec in contract.outputs if spec.shape[1:2] == ("sequence",))

    def __call__(
        self,
        inputs: Input | Sequence[Input],
        *,
        top_k: TopK = "default",
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        max_batch: int = 32,
    ) -> Any:
        """Answer one input or a list of inputs, with the result shapes of the transformers pipeline of the task.

        Args:
            inputs: a text; a pair as a tuple or as ``{"text", "text_pair"}``; for question answering (question, context) or
                ``{"question", "context"}``; for ranking (query, document). Or a list of these.
            top_k: classification: labels to give (None: all; default: the best, without a list around it); fill-mask: tokens
                for a mask (default 5); question answering: answers (default 1).
            aggregation_strategy: token classification: how tokens become entities.
            ignore_labels: token classification: labels to leave out.
            max_answer_len: question answering: longest answer in tokens.
            handle_impossible_answer: question answering: let the empty answer compete.
            max_batch: most texts computed at once.

        Returns:
            Per input: a dict or list of dicts; nested lists [1, sequence, hidden] for feature extraction; a float32 vector
            for sentence similarity (a list gives [n, dimension]).

        Raises:
            UsageError: an option that the task does not have.
            DataError: an input that the task cannot read.
        """
        options = _Options(top_k, aggregation_strategy, tuple(ignore_labels), max_answer_len, handle_impossible_answer)
        self._check(options)
        single = isinstance(inputs, (str, tuple, Mapping))
        items: list[Any] = [inputs] if single else list(inputs)
        texts = [_as_text(item, position) for position, item in enumerate(items)]
        if self.contract.task == "sentence-similarity":
            embeddings = self._vectors(texts, max_batch)
            return embeddings[0] if single else embeddings
        if self.contract.task == "question-answering":
            answers = self._spans(texts, options, max_batch)
        else:
            answers = self._answers(texts, options, max_batch)
        return self._like_pipeline(answers, inputs, options) if single or len(items) == 1 else answers

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Sentence vectors, float32 [n, dimension], in the given order.

        Raises:
            UsageError: the model was not compiled for sentence similarity.
        """
        if self.contract.task != "sentence-similarity":
            raise UsageError(
                f"this model was compiled for {self.contract.task} and gives no sentence vectors",
                hint="compile it with --task sentence-similarity",
            )
        return self._vectors(list(texts), 32)

    def rank(self, query: str, documents: Sequence[str]) -> list[dict[str, Any]]:
        """Dicts with index (into ``documents``) and score, best document first.

        Raises:
            UsageError: the model was not compiled for text ranking.
        """
        if self.contract.task != "text-ranking":
            raise UsageError(
                f"this model was compiled for {self.contract.task} and ranks no documents",
                hint="compile it with --task text-ranking",
            )
        pairs: list[Text] = [(query, document) for document in documents]
        return ranking([answer["score"] for answer in self._answers(pairs, _DEFAULTS, 32)])

    def raw_outputs(self, texts: Sequence[Text]) -> list[dict[str, np.ndarray]]:
        """What :meth:`outputs` gives for texts."""
        return self.outputs(self.tokenizer.encode(texts))

    def outputs(self, encoded: Sequence[Encoded], max_batch: int = 32) -> list[dict[str, np.ndarray]]:
        """Raw outputs of each example by name, in the given order, padding removed.

        Args:
            encoded: tokenized examples.
            max_batch: most examples computed at once; examples of like length go together.

        Returns:
            Per example arrays without the batch axis; token-level outputs are as long as the example itself.

        Raises:
            DataError: an example has no tokens.
        """
        results: list[dict[str, np.ndarray]] = [{}] * len(encoded)
        for index, raw in self._stream(encoded, max_batch):
            results[index] = raw
        return results

    def _stream(self, encoded: Sequence[Encoded], max_batch: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(position, raw outputs) as batches finish, so that no more than one batch of large outputs is held."""
        settings = self.contract.text
        lengths = [item.ids.size for item in encoded]
        if 0 in lengths:
            raise DataError("the text has no tokens", where=f"input {lengths.index(0)}", hint="leave empty texts out")
        for batch in plan_batches(lengths, max_batch):
            arrays = self.runner.run(pad([encoded[index] for index in batch], settings))
            width = lengths[batch[-1]]
            for row, index in enumerate(batch):
                first = width - lengths[index] if settings.padding_side == "left" else 0
                own = slice(first, first + lengths[index])
                yield (
                    index,
                    {name: array[row, own] if name in self._token_level else array[row] for name, array in arrays.items()},
                )

    def _answers(self, texts: Sequence[Text], options: _Options, max_batch: int) -> list[Any]:
        encoded = self.tokenizer.encode(texts)
        answers: list[Any] = [None] * len(texts)
        most = min(max_batch, _FILL_MASK_BATCH) if self.contract.task == "fill-mask" else max_batch
        for index, raw in self._stream(encoded, most):
            answers[index] = self._answer(raw, encoded[index], texts[index], options)
        return answers

    def _answer(self, raw: Mapping[str, np.ndarray], encoded: Encoded, text: Text, options: _Options) -> Any:
        contract = self.contract
        if contract.task == "feature-extraction":
            return features(raw["last_hidden_state"])
        logits = raw["logits"]
        if contract.task == "text-ranking":
            return {"score": relevance(logits, contract.activation)}
        if contract.task == "text-classification":
            scores = label_scores(logits, contract.problem_type, contract.activation)
            if options.top_k == "default":
                return best_label(scores, contract.labels)
            return top_labels(scores, contract.labels, options.top_k)
        if not isinstance(text, str):
            raise DataError(f"{contract.task} reads single texts, not pairs", where=f"input {text[0][:40]!r}")
        if contract.task == "fill-mask":
            return fill_masks(logits, encoded, self.tokenizer, text, _count(options.top_k, 5))
        strategy, ignored = options.aggregation_strategy, options.ignore_labels
        return entities(logits, encoded, text, contract.labels, self.tokenizer, strategy, ignored)

    def _spans(self, texts: Sequence[Text], options: _Options, max_batch: int) -> list[Any]:
        window_tokens = min(_QA_WINDOW_TOKENS, self.contract.text.max_length)
        stride = min(window_tokens // 2, _QA_STRIDE_TOKENS)
        windows: list[list[Encoded]] = []
        for text in texts:
            if isinstance(text, str):
                raise DataError(
                    "question-answering reads a question and a context",
                    where=f"input {text[:40]!r}",
                    hint='give (question, context) or {"question": ..., "context": ...}',
                )
            windows.append(self.tokenizer.encode_windows(text[0], text[1], stride, window_tokens))
        raw = iter(self.outputs([window for own in windows for window in own], max_batch))
        top_k = _count(options.top_k, 1)
        answers: list[Any] = []
        for text, own in zip(texts, windows, strict=True):
            mine = [next(raw) for _ in own]
            spans = best_spans(
                [item["start_logits"] for item in mine],
                [item["end_logits"] for item in mine],
                own,
                text[1],
                context_sequence=1 if self.contract.text.padding_side == "right" else 0,
                top_k=top_k,
                max_answer_len=options.max_answer_len,
                handle_impossible_answer=options.handle_impossible_answer,
            )
            empty = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
            answers.append((spans or [empty])[0] if top_k == 1 else spans)
        return answers

    def _vectors(self, texts: Sequence[Text], max_batch: int) -> np.ndarray:
        spec = self.contract.outputs[0]
        dimension = spec.shape[-1] if isinstance(spec.shape[-1], int) else 0
        raw = self.outputs(self.tokenizer.encode(texts), max_batch)
        return vectors([item[spec.name] for item in raw], dimension)

    def _check(self, options: _Options) -> None:
        for name, tasks in _OPTION_TASKS.items():
            if getattr(options, name) != getattr(_DEFAULTS, name) and self.contract.task not in tasks:
                raise UsageError(
                    f"the option '{name}' has no meaning for {self.contract.task}",
                    where=name,
                    hint=f"it belongs to {', '.join(tasks)}",
                )

    def _like_pipeline(self, answers: list[Any], inputs: object, options: _Options) -> Any:
        """The pipelines' own shapes for one input: some wrap a single answer, some unwrap a list of one."""
        task = self.contract.task
        if task == "text-classification" and isinstance(inputs, str) and options.top_k == "default":
            return answers
        unwraps = task in ("fill-mask", "question-answering")
        return answers[0] if unwraps or isinstance(inputs, (str, tuple, Mapping)) else answers


def _count(top_k: TopK, default: int) -> int:
    """``top_k`` as a number of answers, at least 1."""
    return default if top_k is None or top_k == "default" else max(1, top_k)


def _as_text(item: Any, position: int) -> Text:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        names = {"question": "context", "text": "text_pair"}
        for first, second in names.items():
            if first in item:
                return (item[first], item[second]) if item.get(second) is not None else item[first]
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        return (item[0], item[1])
    raise DataError(
        f"an input must be a text or a pair of texts, not {type(item).__name__}",
        where=f"input {position}",
        hint='give "text", ("text", "second text") or {"text": ..., "text_pair": ...}',
    )
