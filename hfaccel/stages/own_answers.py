"""How good a candidate's own answers are by the task's metric, beside the source's: it refuses what is proven worse, and accepts nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hfaccel.evaluate.example import Example
from hfaccel.evaluate.gate import Loss, paired_loss
from hfaccel.evaluate.perplexity import LanguageLoss, explain_language, judge_language
from hfaccel.evaluate.sequential import TOTAL_ERROR
from hfaccel.stages.examine import Finding

if TYPE_CHECKING:
    from hfaccel.evaluate.metrics import Metric
    from hfaccel.recipe.schema import AccuracySection

Answers = Callable[[Sequence[Example]], Sequence[str]]
"""Writes an answer to each example: the source with its own settings, or a candidate with the same."""


@dataclass(frozen=True)
class AnswersFinding(Finding):
    """What an examination found.

    Attributes:
        answers: loss of the task's metric on the candidate's own answers; None where the data has no references, or nobody
            wrote any. It refuses what is proven to lose more than the budget, and accepts nothing: answers differ or not, and so
            take many examples to prove anything.
        many_rows: loss where a decoder's graph for prompts reads all of a text, as it would read steps of many rows; None without such a
            graph. It refuses nothing: over the budget, such steps run on the other graph.
    """

    answers: Loss | None = None
    many_rows: Loss | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, as the manifest shows a verdict."""
        shown = {"answers": self.answers, "many_rows": self.many_rows}
        return {**super().to_json(), **{name: None if loss is None else asdict(loss) for name, loss in shown.items()}}


class OwnAnswers:
    """Holds the answers that the source wrote, and compares those of one candidate after the other with them.

    Args:
        metric: of the task.
        examples: with references.
        source: writes the source's answers.
        limits: of the gate.
        seed: of the bootstrap.
    """

    def __init__(
        self, metric: Metric, examples: Sequence[Example], source: Answers, limits: AccuracySection, *, seed: int
    ) -> None:
        self._metric = metric
        self._examples = examples
        self._limits = limits
        self._seed = seed
        self._source = list(source(examples))

    def loss(self, answers: Answers) -> Loss:
        """What a candidate loses on the answers that it writes."""
        return paired_loss(
            self._metric,
            self._source,
            list(answers(self._examples)),
            [example.answers for example in self._examples],
            confidence=1 - TOTAL_ERROR,
            clusters=None,
            resamples=self._limits.resamples,
            seed=self._seed,
            # The models do differ: answers that are the same show only that no difference was seen.
            same_outputs=False,
        )


def finding_of(
    loss: LanguageLoss, written: Loss | None, batch_cosine: float, limits: AccuracySection, *, what: str
) -> AnswersFinding:
    """Put together what was found of a generative model; the first gate that was missed gives the reason.

    Args:
        loss: of each next token of given text.
        written: of the candidate's own answers, or None.
        batch_cosine: smallest cosine between logits alone and in a batch.
        limits: of the gates.
        what: was read alone and in a batch, for messages, for example ``a prompt``.
    """
    verdict = judge_language(loss, limits)
    if not verdict.passed:
        return AnswersFinding(verdict, batch_cosine, verdict.reason, explain_language(loss, limits), written)
    if batch_cosine < limits.batch_invariance:
        asked = limits.batch_invariance
        detail = f"{what} alone and in a batch: cosine {batch_cosine:.4f} of the logits, at least {asked} is asked"
        return AnswersFinding(verdict, batch_cosine, "batch-variant", detail, written)
    if written is not None and written.lower_bound > limits.max_loss:
        detail = (
            f"own answers: {written.metric} {written.source:.4f} -> {written.candidate:.4f} on {written.examples} examples: "
            f"loss {written.loss:+.2%}, proven above {written.lower_bound:.2%}, budget {limits.max_loss:.2%}"
        )
        return AnswersFinding(verdict, batch_cosine, "loss-over-budget", detail, written)
    return AnswersFinding(verdict, batch_cosine, None, "", written)
