"""How timings and comparisons read, in every table and in JSON: what was not stable gives no number."""

from __future__ import annotations

from typing import Any

from hfaccel.measure.timing import Speedup, Timing

NOT_STABLE = "not stable"
_MILLISECONDS = 1000.0


def speedup_cells(speedup: Speedup | None) -> tuple[str, str]:
    """Ratio and lower bound, that they are not stable, or nothing for the artifact itself."""
    if speedup is None:
        return ("", "")
    return (f"{speedup.ratio:.2f}x", f"{speedup.lower_bound:.2f}x") if speedup.stable else (NOT_STABLE, "")


def speedup_json(speedup: Speedup) -> dict[str, Any]:
    """A speed-up as plain JSON types; its numbers are null where it was not stable."""
    stable = speedup.stable
    return {
        "stable": stable,
        "ratio": speedup.ratio if stable else None,
        "lower_bound": speedup.lower_bound if stable else None,
        "upper_bound": speedup.upper_bound if stable else None,
    }


def per_second(amount: int, timing: Timing) -> float:
    """Speed at the median, of a run that does so many of something."""
    return amount * _MILLISECONDS / timing.p50


def token_cells(tokens: int, timing: Timing) -> tuple[str, str, str, str]:
    """Tokens per second, milliseconds per token, median and 95th percentile of a run that reads or writes so many tokens."""
    if not timing.stable:
        return (NOT_STABLE, "", "", "")
    return (f"{per_second(tokens, timing):.1f}", f"{timing.p50 / tokens:.2f}", f"{timing.p50:.1f}", f"{timing.p95:.1f}")


def token_json(tokens: int, timing: Timing) -> dict[str, Any]:
    """The same as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
    stable = timing.stable
    return {
        "stable": stable,
        "tokens": tokens,
        "tokens_per_second": per_second(tokens, timing) if stable else None,
        "ms_per_token": timing.p50 / tokens if stable else None,
        "p50_ms": timing.p50 if stable else None,
        "p95_ms": timing.p95 if stable else None,
        "samples_ms": [round(sample, 4) for sample in timing.samples_ms],
    }
