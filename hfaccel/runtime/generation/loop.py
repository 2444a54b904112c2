"""The loop of generation: choose a token for every row, let go of rows that have ended, read the tokens of the others."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np

from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.decoding import Decoding
from hfaccel.runtime.generation.lookahead import Lookahead
from hfaccel.runtime.generation.sampling import SamplingSettings, choose

Accept = Callable[[int, int], bool]
"""Takes (row, token id) of every new token, in turn, and says whether the row has ended with it."""


def generate_tokens(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    settings: SamplingSettings,
    generators: Sequence[np.random.Generator],
    accept: Accept,
) -> Generator[None]:
    """Generate for one batch; yields after every step, when each row that has not ended got a token.

    A row that is alone reads guessed tokens ahead, where the settings and the graph allow it. What a single row has read is kept in
    the decoder, also when the iterator is closed early.

    Args:
        decoder: reads the tokens.
        rows: token ids of each prompt.
        settings: how to choose; the number of tokens and the stop strings are for ``accept`` to watch.
        generators: sources of draws, one per row.
        accept: must end every row before the decoder's context is full.

    Raises:
        DataError: a prompt that cannot be read.
    """
    decoding = decoder.prefill(rows, room=settings.max_new_tokens)
    steps = _steps(decoder, decoding, settings)
    active = list(range(len(rows)))
    try:
        while True:
            chosen = choose(steps.logits, steps.tokens, settings, [generators[row] for row in active])
            tokens = chosen.tolist()
            going = [place for place, row in enumerate(active) if not accept(row, tokens[place])]
            yield
            if not going:
                return
            if len(going) < len(active):
                decoding.keep_rows(going)
                active = [active[place] for place in going]
                steps = _steps(decoder, decoding, settings)
            steps.step(chosen[going])
    finally:
        if len(rows) == 1:
            if isinstance(steps, Lookahead):
                steps.settle()
            decoder.keep(decoding)


def _steps(decoder: Decoder, decoding: Decoding, settings: SamplingSettings) -> Decoding | Lookahead:
    """What takes the steps: the batch itself, or of a row that is alone what guesses ahead for it."""
    if len(decoding.tokens) > 1 or not settings.prompt_lookup_num_tokens or not decoder.gives_several_logits:
        return decoding
    return Lookahead(decoding, settings.prompt_lookup_num_tokens, decoder.settings.guess_price)
