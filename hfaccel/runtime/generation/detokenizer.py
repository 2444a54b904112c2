"""Ids to text while they come: whole characters only, and nothing of a text that ends the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer:
    """The text of one answer, piece by piece. All pieces together are what the tokenizer decodes from all ids at once.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items() if skip_special_tokens else ()
        self._skipped = frozenset(token_id for token_id, token in added if token.special)
        # The ids of the last piece, and behind them those whose text is still to be given. A decoder may treat the first token
        # of a text in a way of its own, so nothing is decoded without what stands before it.
        self._window: list[int] = []
        self._given_ids = 0
        self._given_text = ""

    def push(self, token_id: int) -> str:
        """Text that is complete with this token; empty while a character is not."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        # Bytes in a row are decoded together, and one that does not fit spoils all of them: wait for the end of the row.
        if _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or ""):
            return ""
        text = self._decode()
        return "" if text.endswith(_REPLACEMENT) else self._give(text)

    def finish(self) -> str:
        """The rest, once no token comes any more; it ends with a replacement mark where a character was cut off."""
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        piece = text[len(self._given_text) :]
        if piece:
            self._window = self._window[self._given_ids :]
            self._given_ids = len(self._window)
            self._given_text = self._decode()
        return piece

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return text


class StopFilter:
    """Ends a text before the first of some stop strings, wherever the pieces of the text part.

    The first is the one that is complete first; of two that are complete at once it is the longer.

    Args:
        stop: the stop strings; none of them empty.

    Attributes:
        stopped: whether one was found; the text has ended then.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """Text that no stop string can reach any more; what may become one is held back."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(word), start) for word in self._stop if (start := text.find(word)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        held = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, once no text comes any more."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """A detokenizer with a stop filter behind it.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._filter.stopped

    def push(self, token_id: int) -> str:
        """Text that is certain with this token."""
        return self._filter.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest of the text."""
        return self._filter.push(self._detokenizer.finish()) + self._filter.finish()


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of the text that the word begins with, the whole word excepted."""
    longest = min(len(text), len(word) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(word[:size])), 0)
