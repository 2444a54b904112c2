"""From how many rows on a step is faster on the graph for prompts, measured, where that graph holds the accuracy gate alone as well."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.measure.timing import interleaved
from hfaccel.measure.token_engines import draw_tokens

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract
    from hfaccel.artifact.generation import GenerationSettings
    from hfaccel.runtime.generation.decoder import Decoder
    from hfaccel.runtime.generation.decoding import Decoding
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate

_ROWS = (16, 8, 4)
"""Tried in this order until one is no faster. Fewer than four differ by less than a busy machine does."""
_PROMPT_TOKENS = 32
_STEPS = 64
"""That the cache has room for, twice as many as are timed."""
_SECONDS = 0.5
_FASTER = 1.05


def with_prompt_graph_rows(contract: Contract, decoder: Decoder, chosen: Candidate, ctx: StageContext) -> Contract:
    """The contract with the ``prompt_graph_rows`` of a decoder; as it is where nothing is timed, or accuracy was not shown.

    Args:
        contract: of the decoder.
        decoder: that ships.
        chosen: the candidate that it is, with its verdict.
        ctx: of the stage; off the target nothing is timed.
    """
    settings, lost = contract.generation, (chosen.verdict or {}).get("many_rows")
    if settings is None or lost is None or lost["upper_bound"] > ctx.recipe.accuracy.max_loss or not ctx.on_target:
        return contract
    if settings.context_length < _PROMPT_TOKENS + _STEPS:
        return contract
    faster: int | None = None
    for rows in _ROWS:
        if _speedup(decoder, settings, rows, seed=ctx.recipe.seed) < _FASTER:
            break
        faster = rows
    return replace(contract, generation=replace(settings, prompt_graph_rows=faster))


def _speedup(decoder: Decoder, settings: GenerationSettings, rows: int, *, seed: int) -> float:
    """How many times as fast a step of so many rows is on the graph for prompts."""
    ids = draw_tokens(rows * _PROMPT_TOKENS, settings.vocabulary_size, seed=seed)
    prompts = [ids[start : start + _PROMPT_TOKENS] for start in range(0, len(ids), _PROMPT_TOKENS)]
    ways: dict[str, Decoding] = {
        name: decoder.under(replace(settings, prompt_graph_rows=least)).prefill(prompts, room=_STEPS)
        for name, least in (("steps", None), ("prompts", 1))
    }
    tokens = np.array(ids[:rows], dtype=np.int64)
    runs = {name: partial(_step, way, tokens) for name, way in ways.items()}
    timings = interleaved(runs, seconds=_SECONDS, max_rounds=_STEPS // 2)
    return timings["steps"].p50 / timings["prompts"].p50


def _step(decoding: Decoding, tokens: np.ndarray) -> None:
    decoding.step(tokens)
