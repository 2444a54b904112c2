"""How long two models continue the same prompts with the same tokens, each always taking the token that it holds for the likeliest.

It is told, and refuses nothing. After one near tie the paths part, and what follows is compared with a text that the other model
never wrote: a candidate that is as good as its source may share half of the tokens, one that is worse may share all of those that
were looked at. What a candidate loses is judged by the perplexity of given text (:mod:`hfaccel.evaluate.perplexity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hfaccel.evaluate.clustered import clustered_mean
from hfaccel.evaluate.sequential import TOTAL_ERROR

Tokens = Sequence[int]


@dataclass(frozen=True)
class PathPrompt:
    """A beginning of a text that both models continue.

    Attributes:
        ids: its tokens.
        cluster: number of the text; prompts of one text hang together.
    """

    ids: tuple[int, ...]
    cluster: int


@dataclass(frozen=True)
class GreedyAgreement:
    """What two models wrote alike. Bounds are one-sided, at 95 %, over texts.

    Attributes:
        share: of the source's tokens that the candidate has at the same place.
        share_lower_bound: of that share; 0 where all prompts are of one text.
        prefix_mean: tokens at the start of a continuation that are all the same, on average.
        prefix_lower_bound: of that mean; 0 where all prompts are of one text.
        steps: most tokens of a continuation.
        tokens: of the source's continuations together, which may end earlier.
        prompts: how many were continued.
        texts: how many they come from.
    """

    share: float
    share_lower_bound: float
    prefix_mean: float
    prefix_lower_bound: float
    steps: int
    tokens: int
    prompts: int
    texts: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def greedy_agreement(
    source: Sequence[Tokens],
    candidate: Sequence[Tokens],
    clusters: Sequence[int],
    *,
    steps: int,
    confidence: float = 1 - TOTAL_ERROR,
) -> GreedyAgreement:
    """Compare continuations place by place.

    Args:
        source: what the source wrote after each prompt, the token that ended it included; at least one token each.
        candidate: the same of the candidate. Where it ended before the source the rest of the source's tokens counts as other; what
            it wrote beyond the source's end does not count.
        clusters: number of the text of each prompt.
        steps: most tokens that either could write.
        confidence: of the bounds.

    Raises:
        ValueError: what is compared differs in number, or the source wrote nothing.
    """
    if not len(source) == len(candidate) == len(clusters) or not source or not all(map(len, source)):
        raise ValueError(
            f"{len(source)} and {len(candidate)} continuations of {len(clusters)} prompts: give one of each, none empty"
        )
    same = [_same(first, second) for first, second in zip(source, candidate, strict=True)]
    prefixes = np.array([len(row) if row.all() else int(row.argmin()) for row in same], dtype=np.float64)
    numbers = np.array(clusters, dtype=np.int64)
    shared = clustered_mean(np.concatenate(same).astype(np.float64), np.repeat(numbers, [len(row) for row in same]))
    alike = clustered_mean(prefixes, numbers)
    return GreedyAgreement(
        share=shared.mean,
        share_lower_bound=shared.share_lower_bound(confidence),
        prefix_mean=alike.mean,
        prefix_lower_bound=max(0.0, alike.mean - alike.margin(confidence)),
        steps=steps,
        tokens=shared.tokens,
        prompts=len(source),
        texts=shared.clusters,
    )


def _same(source: Tokens, candidate: Tokens) -> np.ndarray:
    same = np.zeros(len(source), dtype=bool)
    shared = min(len(source), len(candidate))
    same[:shared] = np.asarray(source[:shared]) == np.asarray(candidate[:shared])
    return same
