"""The accuracy gate: everything that speaks for or against a candidate, in one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hfaccel.artifact.contract import ProblemType, Task
from hfaccel.evaluate.agreement import Agreement, RawOutput, compare_outputs
from hfaccel.evaluate.dataset import Dataset
from hfaccel.evaluate.gate import Loss, mean_lower_bound, paired_loss
from hfaccel.evaluate.metrics import MetricName, resolve_metric
from hfaccel.evaluate.predictions import references_of
from hfaccel.recipe.schema import AccuracySection

Reason = Literal["loss-over-budget", "cosine-under-minimum", "agreement-under-minimum", "not-finite"]


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is as good as its source, and the numbers behind it.

    ``agreement_*`` are None for vectors, ``kl_mean`` also for multi-label and single numbers.
    """

    passed: bool
    reason: Reason | None
    losses: tuple[Loss, ...]
    cosine_mean: float
    cosine_lower_bound: float
    agreement_mean: float | None
    agreement_lower_bound: float | None
    kl_mean: float | None
    examples: int
    labelled: bool

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON types."""
        return {**asdict(self), "losses": [asdict(loss) for loss in self.losses]}


def judge(
    *,
    task: Task,
    problem_type: ProblemType | None,
    labels: Sequence[str],
    dataset: Dataset,
    source_outputs: Sequence[RawOutput],
    candidate_outputs: Sequence[RawOutput],
    source_predictions: Any,
    candidate_predictions: Any,
    settings: AccuracySection,
    metric: MetricName | None,
    seed: int,
) -> Verdict:
    """Judge a candidate against its source on the same inputs.

    Vectors must keep their cosine, with labels or without. With labels the bound of the loss must lie inside the budget; without,
    the bound of the agreement must reach its minimum. Outputs that are not finite fail. Equal bits always pass.

    Args:
        task: the task.
        problem_type: of classification tasks.
        labels: label names in id order.
        dataset: what both models were run on.
        source_outputs: raw outputs of the source, per input.
        candidate_outputs: raw outputs of the candidate, per input.
        source_predictions: post-processed predictions per example; not looked at when the data is unlabelled.
        candidate_predictions: the same of the candidate.
        settings: the limits.
        metric: the metric; None takes the task's own.
        seed: of the bootstrap.

    Raises:
        SettingsError: the metric does not fit the task.
        ValueError: outputs or predictions do not fit each other in number or shape.
    """
    agreement = compare_outputs(task, source_outputs, candidate_outputs, problem_type=problem_type)
    vectors = agreement.top1 is None
    labelled = dataset.labelled and task not in ("feature-extraction", "fill-mask")
    cosine_mean, cosine_bound = _bound(agreement, agreement.cosine, shares=False)
    agreement_mean, agreement_bound = (None, None) if vectors else _bound(agreement, agreement.top1, shares=True)
    losses: tuple[Loss, ...] = ()
    if labelled and agreement.non_finite == 0:
        loss = paired_loss(
            resolve_metric(metric, task, problem_type),
            source_predictions,
            candidate_predictions,
            references_of(task, problem_type, labels, dataset),
            clusters=dataset.clusters(),
            resamples=settings.resamples,
            seed=seed,
            same_outputs=agreement.identical,
        )
        losses = (loss,)
    reason: Reason | None = None
    if agreement.non_finite:
        reason = "not-finite"
    elif vectors and cosine_bound < settings.min_cosine:
        reason = "cosine-under-minimum"
    elif any(loss.upper_bound > settings.max_loss for loss in losses):
        reason = "loss-over-budget"
    elif not labelled and agreement_bound is not None and agreement_bound < settings.min_agreement:
        reason = "agreement-under-minimum"
    return Verdict(
        passed=reason is None,
        reason=reason,
        losses=losses,
        cosine_mean=cosine_mean,
        cosine_lower_bound=cosine_bound,
        agreement_mean=agreement_mean,
        agreement_lower_bound=agreement_bound,
        kl_mean=None if agreement.kl is None else float(agreement.kl.mean()),
        examples=len(dataset.examples),
        labelled=labelled,
    )


def _bound(agreement: Agreement, values: Any, *, shares: bool) -> tuple[float, float]:
    """Mean and lower bound; outputs that are equal to the bit need no statistics."""
    return (1.0, 1.0) if agreement.identical else mean_lower_bound(values, shares=shares)
