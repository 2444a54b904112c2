"""The loop of an encoder-decoder: rule out tokens, choose one for every row, let go of rows that have ended, read the others."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from hfaccel.errors import DataError
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.loop import Accept
from hfaccel.runtime.generation.memory import Memory
from hfaccel.runtime.generation.rules import Hook, TokenRules, rooms_of
from hfaccel.runtime.generation.sampling import SamplingSettings, take


def answer_tokens(
    model: EncoderDecoder,
    memory: Memory,
    rows: Sequence[Sequence[int]],
    settings: SamplingSettings,
    rules: TokenRules,
    generators: Sequence[np.random.Generator],
    accept: Accept,
    hook: Hook | None = None,
) -> Generator[None]:
    """Answer one batch; yields after every step, when each row that has not ended got a token.

    A row ends with one of the end tokens of the rules, with ``settings.max_new_tokens`` tokens, where the decoder's context is
    full, or where ``accept`` says so.

    Args:
        model: reads the tokens.
        memory: of the sources, one per row.
        rows: what each answer begins with.
        settings: how to choose. Its ``repetition_penalty`` is not looked at (it is one of the rules), nor are its stop strings,
            which are for ``accept`` to watch.
        rules: what may be chosen.
        generators: sources of draws, one per row.
        accept: is given every new token.
        hook: applied to the logits behind the rules.

    Raises:
        DataError: rows that cannot be read, or that leave no room for an answer.
    """
    check_room(rows, model.settings.context_length)
    rooms = rooms_of(rows, settings.max_new_tokens, model.settings.context_length)
    decoding = model.prefill(memory, rows, room=max(rooms))
    active = list(range(len(rows)))
    while True:
        new = [decoding.tokens[place][len(rows[row]) :] for place, row in enumerate(active)]
        logits = rules.apply(decoding.logits, decoding.tokens, [len(ids) for ids in new], [rooms[row] for row in active])
        if hook is not None:
            logits = hook(new, logits)
        chosen = take(logits, settings, [generators[row] for row in active])
        going = []
        for place, (row, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
            ended = token in rules.end_token_ids or len(new[place]) + 1 >= rooms[row]
            if not (accept(row, token) or ended):
                going.append(place)
        yield
        if not going:
            return
        if len(going) < len(active):
            decoding.keep_rows(going)
            active = [active[place] for place in going]
        decoding.step(chosen[going])


def check_room(rows: Sequence[Sequence[int]], context_length: int) -> None:
    """Say it plainly when what an answer begins with leaves no room for it.

    Raises:
        DataError: it does not.
    """
    for index, row in enumerate(rows):
        if len(row) >= context_length:
            raise DataError(
                f"the answer begins with {len(row)} tokens, and the decoder reads {context_length}, the answer included",
                where=f"row {index}",
                hint="begin with fewer",
            )
