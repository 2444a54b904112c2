"""Numbers and names of the manifest in the words of the reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_MEASURED = "not measured"
FLOAT_BITS = 32
REASONS = {
    "needs-calibration-data": "not built: needs calibration text",
    "build-failed": "not built",
    "engine-not-installed": "not built: engine not installed",
    "engine-not-wanted": "not built: engine not asked for",
    "not-supported-by-target": "not built: the target cannot",
    "not-supported-by-model": "not built: the model has another form",
    "budget-too-small": "not built: for a larger budget",
    "not-for-objective": "not built: for another objective",
    "not-finite": "refused: NaN or infinity",
    "size-over-limit": "refused: larger than allowed",
    "slower-than-parent": "refused: not faster than float",
    "p95-over-limit": "refused: slower than allowed",
    "loss-over-budget": "refused: loss over the budget",
    "slice-loss-over-budget": "refused: part of the data loses too much",
    "cosine-under-minimum": "refused: vectors too far off",
    "agreement-under-minimum": "refused: too many other answers",
    "batch-variant": "refused: depends on its batch",
    "no-float-set-found": "refused: no fallback found",
    "slower-than-accepted": "slower than one that holds, not judged",
    "not-better-than-chosen": "holds all gates, not chosen",
}
PRECISIONS = {"int8": "8-bit", "int4": "4-bit", "fp32": "float", "bf16": "bfloat16", "fp16": "float16"}


def milliseconds(value: float) -> str:
    """Three digits that matter, with the unit."""
    return f"{significant(value)} ms"


def significant(value: float) -> str:
    """Three significant digits, never in exponent notation."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def megabytes(value: int | None) -> str:
    """Bytes in millions of bytes, with the unit."""
    return f"{significant(value / 1e6)} MB" if value else NOT_MEASURED


def percent(value: float, *, signed: bool = False) -> str:
    """A share in per cent; two decimals."""
    return f"{value:+z.2%}" if signed else f"{value:.2%}"


def point_words(point: str) -> str:
    """``8x128`` as ``8 texts of 128 tokens``; what is not of that form, as it is."""
    batch, _, length = point.partition("x")
    if not (batch.isdigit() and length.isdigit()):
        return point
    return f"{batch} text{'' if batch == '1' else 's'} of {length} tokens"


def precision_words(precision: str) -> str:
    """A precision as people say it."""
    return PRECISIONS.get(precision, precision)


def reason_words(reason: str | None) -> str:
    """Why a candidate does not ship; empty for the one that does."""
    return REASONS.get(reason, reason) if reason else ""


def shortened(text: str, length: int) -> str:
    """The text, or its two ends with an ellipsis: names of candidates differ at either."""
    head = length // 2
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - length + head + 1 :]}"


def cache_words(bits: int, token_bytes: int) -> str:
    """How keys and values are stored, and what a token takes: ``8 bits, 11,520 bytes a token``."""
    return f"{'float32' if bits == FLOAT_BITS else f'{bits} bits'}, {token_bytes:,} bytes a token"


def examples_words(loss: Mapping[str, Any]) -> str:
    """What a loss was measured on, counted: labelled examples, texts without labels, or texts whose every next token counts."""
    if loss.get("method") == "documents":
        return f"{loss['examples']} texts"
    return f"{loss['examples']} labelled examples" if loss.get("labelled", True) else f"{loss['examples']} texts without labels"


def greedy_words(greedy: Mapping[str, Any]) -> str:
    """How much of what the source writes the candidate writes too, always taking the likeliest token."""
    prompts, texts = greedy["prompts"], greedy["texts"]
    of = f"{prompts} prompts of {texts} text{'' if texts == 1 else 's'}" if prompts > 1 else "a prompt"
    share, prefix = f"{greedy['share']:.1%}", f"{greedy['prefix_mean']:.1f}"
    if texts > 1:
        share += f" (with 95 % confidence at least {greedy['share_lower_bound']:.1%})"
        prefix += f" (at least {greedy['prefix_lower_bound']:.1f})"
    bound = "" if texts > 1 else "; one text gives no bound"
    return (
        f"Continuing {of} by {greedy['steps']} tokens, always the likeliest, {share} of its tokens are the source's, place by place, and "
        f"the first {prefix} on average{bound}. That decides nothing: after one near tie two texts part for good."
    )
