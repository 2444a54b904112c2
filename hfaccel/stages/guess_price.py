"""What a guessed token costs in the graph that ships, measured, so that the run time guesses as far as it pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.measure.timing import interleaved
from hfaccel.measure.token_engines import draw_tokens

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract
    from hfaccel.runtime.generation.decoder import Decoder
    from hfaccel.stages.base import StageContext

_GUESSES = 3
"""Of the longer step; prompt lookup rarely guesses more than five, and the first ones cost the least."""
_PROMPT_TOKENS = 128
_SECONDS = 1.0
_LEAST, _MOST = 0.02, 1.0


def with_guess_price(contract: Contract, decoder: Decoder, ctx: StageContext) -> Contract:
    """The contract with the ``guess_price`` of a decoder; as it is where nothing is timed or nothing can be guessed.

    Args:
        contract: of the decoder.
        decoder: that ships.
        ctx: of the stage; off the target nothing is timed.
    """
    settings = contract.generation
    if settings is None or not ctx.on_target:
        return contract
    prompt = min(_PROMPT_TOKENS, settings.context_length // 2)
    if not decoder.gives_several_logits or prompt < 1 or settings.context_length - prompt <= _GUESSES:
        return contract
    ids = draw_tokens(prompt + 1 + _GUESSES, settings.vocabulary_size, seed=ctx.recipe.seed)
    decoding = decoder.prefill([ids[:prompt]], room=1 + _GUESSES)

    def reading(tokens: int) -> Callable[[], None]:
        def run() -> None:
            decoding.read_ahead(ids[prompt : prompt + tokens])
            decoding.take_back(tokens)

        return run

    timings = interleaved({"step": reading(1), "guessing": reading(1 + _GUESSES)}, seconds=_SECONDS, pause_s=0.0)
    price = (timings["guessing"].p50 / timings["step"].p50 - 1) / _GUESSES
    return replace(contract, generation=replace(settings, guess_price=round(min(_MOST, max(_LEAST, price)), 3)))
