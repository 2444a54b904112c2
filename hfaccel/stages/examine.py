"""Examines graphs against the source on the evaluation data: the accuracy gate and batch invariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfaccel.evaluate.judge import Verdict, judge
from hfaccel.runtime.model import Model
from hfaccel.stages.candidates import Reason
from hfaccel.stages.evaluation import Evaluation, encode_dataset, evaluate, smallest_batch_cosine

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.runtime.session import Runner
    from hfaccel.runtime.tokenizer import TextTokenizer
    from hfaccel.stages.base import StageContext

INVARIANCE_TEXTS = 8


@dataclass(frozen=True)
class Finding:
    """What an examination found.

    Attributes:
        verdict: of the accuracy gate.
        batch_cosine: smallest cosine between an example alone and in a padded batch.
        reason: which gate was missed, or None.
        detail: the reason in words and numbers.
    """

    verdict: Verdict
    batch_cosine: float
    reason: Reason | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, as the manifest shows a verdict."""
        return {**self.verdict.to_json(), "batch_cosine": self.batch_cosine}


class Examiner:
    """Holds the source's answers, and examines one graph after the other against them.

    Args:
        source: the source model, or whatever stands for it.
        dataset: what both are run on.
        tokenizer: of the checkpoint.
        contract: of the graphs.
        ctx: of the stage: the gate's limits, the metric, the seed.
    """

    def __init__(self, source: Runner, dataset: Dataset, tokenizer: TextTokenizer, contract: Contract, ctx: StageContext) -> None:
        self.dataset = dataset
        self._tokenizer = tokenizer
        self._contract = contract
        self._limits = ctx.recipe.accuracy
        self._metric = ctx.metric
        self._seed = ctx.recipe.seed
        self._source: Evaluation = evaluate(Model(source, tokenizer, contract), dataset)

    def examine(self, runner: Runner) -> Finding:
        """Run a graph over the data and judge it."""
        model = Model(runner, self._tokenizer, self._contract)
        result = evaluate(model, self.dataset)
        verdict = judge(
            task=self._contract.task,
            problem_type=self._contract.problem_type,
            labels=self._contract.labels,
            dataset=self.dataset,
            source_outputs=self._source.outputs,
            candidate_outputs=result.outputs,
            source_predictions=self._source.predictions,
            candidate_predictions=result.predictions,
            settings=self._limits,
            metric=self._metric,
            seed=self._seed,
        )
        invariance = smallest_batch_cosine(model, encode_dataset(model, self.dataset)[:INVARIANCE_TEXTS])
        if not verdict.passed:
            return Finding(verdict, invariance, verdict.reason, self._why(verdict))
        if invariance < self._limits.batch_invariance:
            asked = self._limits.batch_invariance
            detail = f"an example alone and in a batch: cosine {invariance:.4f}, at least {asked} is asked"
            return Finding(verdict, invariance, "batch-variant", detail)
        return Finding(verdict, invariance, None, "")

    def _why(self, verdict: Verdict) -> str:
        if verdict.reason == "loss-over-budget":
            worst = max(verdict.losses, key=lambda loss: loss.upper_bound)
            return (
                f"{worst.metric} {worst.source:.4f} -> {worst.candidate:.4f}: loss {worst.loss:+.2%}, "
                f"95 % bound {worst.upper_bound:+.2%}, budget {self._limits.max_loss:.2%}"
            )
        if verdict.reason == "cosine-under-minimum":
            return (
                f"mean cosine {verdict.cosine_mean:.4f}, 95 % bound {verdict.cosine_lower_bound:.4f}, "
                f"at least {self._limits.min_cosine} is asked"
            )
        if verdict.reason == "agreement-under-minimum":
            return (
                f"same answer as the source in {verdict.agreement_mean:.2%}, 95 % bound {verdict.agreement_lower_bound:.2%}, "
                f"at least {self._limits.min_agreement:.2%} is asked"
            )
        return "NaN or infinity in the outputs"
