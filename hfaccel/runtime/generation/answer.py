"""One answer while it grows: its tokens, its text, and whether it has ended."""

from __future__ import annotations

from hfaccel.runtime.generation.detokenizer import AnswerText


class Answer:
    """One answer as it grows.

    Args:
        room: most tokens.
        end_token_ids: any of them ends it.
        text: turns ids into text, and ends the answer where a stop string comes; None where only ids are wanted.

    Attributes:
        ids: of the tokens so far; the one that ended the answer is the last.
    """

    def __init__(self, room: int, end_token_ids: frozenset[int], text: AnswerText | None) -> None:
        self.ids: list[int] = []
        self._room = room
        self._end_token_ids = end_token_ids
        self._text = text
        self._pieces: list[str] = []

    def add(self, token: int) -> bool:
        """Take a new token; whether the answer has ended with it."""
        self.ids.append(token)
        if token in self._end_token_ids:
            return True
        if self._text is not None:
            self._pieces.append(self._text.push(token))
            if self._text.stopped:
                return True
        return len(self.ids) >= self._room

    def take(self) -> str:
        """The text since the last call, as far as it is certain."""
        piece = "".join(self._pieces)
        self._pieces.clear()
        return piece

    def text(self) -> str:
        """The text since the last call, once the answer has ended."""
        if self._text is not None:
            self._pieces.append(self._text.finish())
        return self.take()
