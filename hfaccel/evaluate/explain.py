"""A verdict's reason in words and numbers."""

from __future__ import annotations

from hfaccel.evaluate.judge import Verdict
from hfaccel.recipe.schema import AccuracySection


def explain(verdict: Verdict, settings: AccuracySection) -> str:
    """Why a candidate did not pass; where the data was too small to tell, how much of it would do.

    Args:
        verdict: with its reason.
        settings: the limits that it was judged by.
    """
    if verdict.reason == "not-finite":
        return "NaN or infinity in the outputs"
    if verdict.reason == "slice-loss-over-budget":
        return _slice(verdict)
    return _numbers(verdict, settings) + _too_few(verdict, settings)


def _slice(verdict: Verdict) -> str:
    worst = max(verdict.slices, key=lambda item: item.lower_bound - item.limit)
    return (
        f"{worst.name}: {worst.metric} {worst.source:.4f} -> {worst.candidate:.4f} on {worst.examples} examples: "
        f"loss {worst.loss:+.2%}, proven above {worst.lower_bound:.2%}, a slice may lose {worst.limit:.2%}"
    )


def _numbers(verdict: Verdict, settings: AccuracySection) -> str:
    if verdict.reason == "loss-over-budget":
        worst = max(verdict.losses, key=lambda loss: loss.upper_bound)
        return (
            f"{worst.metric} {worst.source:.4f} -> {worst.candidate:.4f}: loss {worst.loss:+.2%}, "
            f"95 % bound {worst.upper_bound:+.2%}, budget {settings.max_loss:.2%}"
        )
    if verdict.reason == "cosine-under-minimum":
        return (
            f"mean cosine {verdict.cosine_mean:.4f}, 95 % bound {verdict.cosine_lower_bound:.4f}, "
            f"at least {settings.min_cosine} is asked"
        )
    what, asked = ("answer", settings.min_agreement) if verdict.losses else ("order", settings.min_same_order)
    return (
        f"same {what} as the source in {verdict.agreement_mean:.2%}, 95 % bound {verdict.agreement_lower_bound:.2%}, "
        f"at least {asked:.2%} is asked"
    )


def _too_few(verdict: Verdict, settings: AccuracySection) -> str:
    if not verdict.too_few_examples:
        return ""
    seen = f"; what was seen is within the limit, but {verdict.examples} examples are too few to prove it: "
    if verdict.examples_needed is None:
        return seen + "so close to the limit no practical number would decide"
    more = f"about {verdict.examples_needed} examples would decide"
    above = verdict.examples_needed > settings.max_examples
    return seen + more + (f" (with accuracy.max_examples above {settings.max_examples})" if above else "")
