"""The accuracy gate: everything that speaks for or against a candidate, in one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hfaccel.artifact.contract import ProblemType, Task
from hfaccel.evaluate.agreement import Agreement, RawOutput, compare_outputs
from hfaccel.evaluate.bounds import mean_lower_bound, mean_upper_bound, share_lower_bound
from hfaccel.evaluate.dataset import Dataset
from hfaccel.evaluate.gate import MOST_EXAMPLES, Loss, round_up
from hfaccel.evaluate.metrics import EXPECTED_ACCURACY, MetricName, resolve_metric
from hfaccel.evaluate.predictions import references_of
from hfaccel.evaluate.sequential import TOTAL_ERROR, Look, Outcome
from hfaccel.evaluate.slices import Scores, Slice, SliceLoss, find_slices, slice_agreements, slice_losses
from hfaccel.recipe.schema import AccuracySection

Reason = Literal["loss-over-budget", "slice-loss-over-budget", "cosine-under-minimum", "agreement-under-minimum", "not-finite"]


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is as good as its source, and the numbers behind it.

    Attributes:
        passed: whether it is proven to be.
        decided: whether more examples can no longer change that; False only at a look that is not the last.
        reason: why it did not pass, or None.
        losses: of the metric on labelled data; without labels, of the accuracy to expect by the source's own probabilities.
        slices: the loss of parts of the data.
        cosine_mean: of the outputs with the source's.
        cosine_lower_bound: of that mean.
        agreement_mean: share of equal decisions; None for vectors.
        agreement_lower_bound: of that mean.
        kl_mean: None for vectors, multi-label and single numbers.
        examples: how many were looked at.
        examples_needed: roughly how many would decide, where what was seen lies inside the limit and only the bound does not;
            None also where no practical number would.
        too_few_examples: whether that is why the candidate did not pass.
        looks: how many looks were taken.
        labelled: whether references were used.
    """

    passed: bool
    decided: bool
    reason: Reason | None
    losses: tuple[Loss, ...]
    slices: tuple[SliceLoss, ...]
    cosine_mean: float
    cosine_lower_bound: float
    agreement_mean: float | None
    agreement_lower_bound: float | None
    kl_mean: float | None
    examples: int
    examples_needed: int | None
    too_few_examples: bool
    looks: int
    labelled: bool

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON types."""
        lists = {"losses": [asdict(loss) for loss in self.losses], "slices": [asdict(item) for item in self.slices]}
        return {**asdict(self), **lists}


@dataclass(frozen=True)
class _Bounds:
    """A mean that must not fall below a minimum."""

    mean: float
    lower: float
    upper: float
    shares: bool
    examples: int

    def outcome(self, look: Look, minimum: float) -> Outcome:
        return look.outcome(-self.upper, -self.lower, -minimum)

    def examples_needed(self, minimum: float) -> int | None:
        """How many examples would bring the lower bound to the minimum, were the mean as seen."""
        if self.mean <= minimum:
            return None
        if not self.shares:
            return round_up(self.examples * ((self.mean - self.lower) / (self.mean - minimum)) ** 2)
        count = float(self.examples)
        while count < MOST_EXAMPLES and share_lower_bound(self.mean * count, count, confidence=1 - TOTAL_ERROR) < minimum:
            count *= 1.01
        return round_up(count)


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
    look: Look | None = None,
    slices: Sequence[Slice] | None = None,
) -> Verdict:
    """Judge a candidate against its source on the same inputs.

    Vectors must keep their cosine, with labels or without. The bound of the loss must lie inside the budget: that of the metric
    with labels, and without that of the accuracy to expect by the source's own probabilities, to which another answer costs little
    where the source was of two minds; there the bound of the agreement must reach its minimum too, lest a source that is never sure
    excuse everything. No slice may be proven to lose more than a slice may. Outputs that are not finite fail. Equal bits always pass.

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
        look: which look at the data this is; None: the only one.
        slices: of the examples; None finds them.

    Raises:
        SettingsError: the metric does not fit the task.
        ValueError: outputs or predictions do not fit each other in number or shape.
    """
    look = look or Look(examples=len(dataset.examples))
    slices = find_slices(dataset, labels, task, problem_type) if slices is None else slices
    agreement = compare_outputs(task, source_outputs, candidate_outputs, problem_type=problem_type)
    labelled = dataset.labelled and task not in ("feature-extraction", "fill-mask")
    cosine = _bounds(agreement, agreement.cosine, look, shares=False)
    same = None if agreement.top1 is None else _bounds(agreement, agreement.top1, look, shares=True)
    losses: tuple[Loss, ...] = ()
    parts: tuple[SliceLoss, ...] = ()
    scores: Scores | None = None
    if labelled:
        references = references_of(task, problem_type, labels, dataset)
        named = resolve_metric(metric, task, problem_type)
        scores = Scores(named, source_predictions, candidate_predictions, references, dataset.clusters(), agreement.identical)
    elif agreement.expected is not None:
        # The references are the probabilities, which are in the scores already.
        own, others = agreement.expected.source, agreement.expected.candidate
        largest_cost = float((own - agreement.expected.worst).max())
        scores = Scores(EXPECTED_ACCURACY, own, others, own, dataset.clusters(), agreement.identical, largest_cost)
    if scores is None:
        parts = slice_agreements(slices, dataset, agreement, settings=settings, error=look.refuse_error)
    elif agreement.non_finite == 0:
        accept, refuse = 1 - look.accept_error, 1 - look.refuse_error
        loss = scores.loss(confidence=accept, lower_confidence=refuse, resamples=settings.resamples, seed=seed)
        losses = (replace(loss, labelled=labelled),)
        parts = slice_losses(slices, scores, problem_type=problem_type, settings=settings, error=look.refuse_error, seed=seed)
    decision = _decide(agreement, cosine, same, losses, parts, settings, look, labelled=labelled)
    return Verdict(
        passed=decision.outcome == "accepted",
        decided=decision.outcome != "open",
        reason=decision.reason,
        losses=losses,
        slices=parts,
        cosine_mean=cosine.mean,
        cosine_lower_bound=cosine.lower,
        agreement_mean=None if same is None else same.mean,
        agreement_lower_bound=None if same is None else same.lower,
        kl_mean=None if agreement.kl is None else float(agreement.kl.mean()),
        examples=len(dataset.examples),
        examples_needed=decision.examples_needed,
        too_few_examples=decision.too_few_examples,
        looks=look.number,
        labelled=labelled,
    )


def _bounds(agreement: Agreement, values: Any, look: Look, *, shares: bool) -> _Bounds:
    """Mean and bounds; outputs that are equal to the bit need no statistics."""
    if agreement.identical:
        return _Bounds(1.0, 1.0, 1.0, shares, len(values))
    mean, lower = mean_lower_bound(values, confidence=1 - look.accept_error, shares=shares)
    return _Bounds(mean, lower, mean_upper_bound(values, confidence=1 - look.refuse_error, shares=shares), shares, len(values))


@dataclass(frozen=True)
class _Decision:
    outcome: Outcome
    reason: Reason | None = None
    examples_needed: int | None = None
    too_few_examples: bool = False


def _decide(
    agreement: Agreement,
    cosine: _Bounds,
    same: _Bounds | None,
    losses: Sequence[Loss],
    slices: Sequence[SliceLoss],
    settings: AccuracySection,
    look: Look,
    *,
    labelled: bool,
) -> _Decision:
    """What all gates together say; the first that was missed gives the reason."""
    if agreement.non_finite:
        return _Decision("refused", "not-finite")
    found: list[tuple[Outcome, Reason, int | None, bool]] = []
    if same is None:
        minimum = settings.min_cosine
        needed = cosine.examples_needed(minimum)
        found.append((cosine.outcome(look, minimum), "cosine-under-minimum", needed, cosine.mean >= minimum))
    for loss in losses:
        outcome = look.outcome(loss.lower_bound, loss.upper_bound, settings.max_loss)
        needed = loss.examples_needed(settings.max_loss, confidence=1 - TOTAL_ERROR)
        found.append((outcome, "loss-over-budget", needed, loss.loss <= settings.max_loss))
    if same is not None and not labelled:
        minimum = settings.min_agreement if losses else settings.min_same_order
        needed = same.examples_needed(minimum)
        found.append((same.outcome(look, minimum), "agreement-under-minimum", needed, same.mean >= minimum))
    for outcome, reason, needed, inside in found:
        if outcome == "refused":
            return _Decision(outcome, reason, needed if inside else None, inside)
    if any(item.lower_bound > item.limit for item in slices):
        return _Decision("refused", "slice-loss-over-budget")
    for outcome, reason, _, _ in found:
        if outcome == "open":
            return _Decision(outcome, reason)
    # Stopping early takes examples from the slices too: where one of them looks hurt, it is to be seen in full.
    if not look.last and any(item.loss > item.limit for item in slices):
        return _Decision("open", "slice-loss-over-budget")
    return _Decision("accepted")
