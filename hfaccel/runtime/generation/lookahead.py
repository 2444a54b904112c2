"""Steps that read guessed tokens along with the chosen one, so that a right guess saves a step.

Speculative decoding (Leviathan et al., 2023, arXiv:2211.17192) with guesses that cost nothing. Every token is still chosen from the
model's own logits after the tokens before it, also where tokens are drawn: guesses change how long it takes, not what is chosen.
(A kernel may sum several tokens in another order than one, as it does for rows of a batch. Of float graphs that is the last bit; where
activations are rounded it grows to the size of the rounding error, and a near tie may fall the other way.)
"""

from __future__ import annotations

import numpy as np

from hfaccel.runtime.generation.decoding import Decoding
from hfaccel.runtime.generation.prompt_lookup import PromptLookup


class Lookahead:
    """A batch of one row on its way, like :class:`~hfaccel.runtime.generation.decoding.Decoding` for whoever takes steps.

    Args:
        decoding: of one row, whose graph gives the logits of several tokens; it is stepped by this class only, until
            :meth:`settle`.
        most_guesses: in a step.
        price: of a guess, see :class:`~hfaccel.runtime.generation.prompt_lookup.PromptLookup`.

    Attributes:
        tokens: token ids of the row, without guesses.
        logits: float32 [1, vocabulary], of the token that comes next.
        saved_steps: right guesses so far.
    """

    def __init__(self, decoding: Decoding, most_guesses: int, price: float) -> None:
        self.tokens: list[list[int]] = [list(decoding.tokens[0])]
        self.logits = decoding.logits
        self.saved_steps = 0
        self._decoding = decoding
        self._most_guesses = most_guesses
        self._lookup = PromptLookup(self.tokens[0], price)
        self._guesses: list[int] = []  # read already, and not chosen yet
        self._after_guesses = decoding.logits[:0]  # [guesses, vocabulary]

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Read one more token.

        Args:
            ids: int64 [1].

        Returns:
            The new ``logits``, float32 [1, vocabulary].

        Raises:
            DataError: the row has as many tokens as the model reads.
        """
        token = int(ids[0])
        self.tokens[0].append(token)
        self._lookup.append(token)
        if self._guesses and self._guesses[0] == token:
            self.saved_steps += 1
            self._guesses = self._guesses[1:]
        else:
            self.settle()
            guesses = self._lookup.guess(min(self._most_guesses, self._decoding.room - 1))
            self._after_guesses = self._decoding.read_ahead([token, *guesses])
            self._guesses = guesses  # only now: what an interrupted run did not read must not be taken back
        self.logits, self._after_guesses = self._after_guesses[:1], self._after_guesses[1:]
        return self.logits

    def settle(self) -> None:
        """Forget guesses that were read and not chosen; the decoding then holds what ``tokens`` says."""
        self._decoding.take_back(len(self._guesses))
        self._guesses = []
