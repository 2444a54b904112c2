"""Examines graphs against the source on the evaluation data: the accuracy gate and batch invariance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfaccel.evaluate.explain import explain
from hfaccel.evaluate.judge import Verdict, judge
from hfaccel.evaluate.sequential import Look, order_of
from hfaccel.evaluate.slices import find_slices
from hfaccel.runtime.model import Model
from hfaccel.stages.candidates import Reason
from hfaccel.stages.evaluation import Evaluation, encode_dataset, evaluate, join, smallest_batch_cosine

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.runtime.session import Runner
    from hfaccel.runtime.tokenizer import TextTokenizer
    from hfaccel.stages.base import StageContext

INVARIANCE_TEXTS = 8
BRIEF_EXAMPLES = 50


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

    Large data is looked at part by part, in an order drawn once for all graphs, until the case is clear.

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
        order, self._looks = order_of(dataset.clusters(), len(dataset.examples), ctx.recipe.seed)
        self._ordered = replace(dataset, examples=tuple(dataset.examples[index] for index in order))
        self._slices = find_slices(self._ordered, contract.labels, contract.task, contract.problem_type)
        self._source: Evaluation = evaluate(Model(source, tokenizer, contract), self._ordered)

    def examine(self, runner: Runner, *, error_share: float = 1.0, brief: bool = False) -> Finding:
        """Run a graph over as much of the data as it takes, and judge it.

        Args:
            runner: the graph.
            error_share: how much of the 5 % this verdict may err with, where it is one of several on the same data.
            brief: of data without labels look at the first examples only, too few to bound anything: the graph is known to be the
                source.
        """
        model = Model(runner, self._tokenizer, self._contract)
        first = replace(self.dataset, examples=self.dataset.examples[:INVARIANCE_TEXTS])
        invariance = smallest_batch_cosine(model, encode_dataset(model, first)[:INVARIANCE_TEXTS])
        brief = brief and not self.dataset.labelled
        verdict = self._glance(model) if brief else self._judge(model, error_share)
        if not verdict.passed and (not brief or verdict.reason == "not-finite"):
            return Finding(verdict, invariance, verdict.reason, explain(verdict, self._limits))
        if invariance < self._limits.batch_invariance:
            asked = self._limits.batch_invariance
            detail = f"an example alone and in a batch: cosine {invariance:.4f}, at least {asked} is asked"
            return Finding(verdict, invariance, "batch-variant", detail)
        return Finding(verdict, invariance, None, "")

    def _glance(self, model: Model) -> Verdict:
        look = Look(examples=min(BRIEF_EXAMPLES, len(self.dataset.examples)))
        return replace(self._verdict(evaluate(model, self._part(0, look.examples)), look), losses=())

    def _judge(self, model: Model, error_share: float) -> Verdict:
        """The verdict of the first look that decides."""
        first, *others = (replace(look, accept_error=look.accept_error * error_share) for look in self._looks)
        seen = evaluate(model, self._part(0, first.examples))
        verdict, before = self._verdict(seen, first), first.examples
        for look in others:
            if verdict.decided:
                break
            seen = join(seen, evaluate(model, self._part(before, look.examples)))
            verdict, before = self._verdict(seen, look), look.examples
        return verdict

    def _part(self, start: int, stop: int) -> Dataset:
        return replace(self._ordered, examples=self._ordered.examples[start:stop])

    def _verdict(self, seen: Evaluation, look: Look) -> Verdict:
        return judge(
            task=self._contract.task,
            problem_type=self._contract.problem_type,
            labels=self._contract.labels,
            dataset=self._part(0, look.examples),
            source_outputs=self._source.outputs[: len(seen.outputs)],
            candidate_outputs=seen.outputs,
            source_predictions=self._source.predictions[: look.examples],
            candidate_predictions=seen.predictions,
            settings=self._limits,
            metric=self._metric,
            seed=self._seed,
            look=look,
            slices=[item.first(look.examples) for item in self._slices],
        )
