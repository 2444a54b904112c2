"""What was said and when: from tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfaccel.runtime.speech.timestamps import TokenSegment

# A time from a sum of window start and steps; what lies behind the sixth place is rounding.
_DECIMALS = 6


@dataclass(frozen=True)
class Segment:
    """Some words of a sound, and where they are in it, in seconds from its start."""

    start_seconds: float
    end_seconds: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said in a sound.

    Attributes:
        text: all of it, without blanks at the ends.
        segments: parts of it with their times, in order; empty unless times were asked for.
        language: code of the language that was asked for or heard; None of a model that knows only one.
    """

    text: str
    segments: tuple[Segment, ...] = ()
    language: str | None = None


def make_segment(tokenizer: Any, segment: TokenSegment) -> Segment | None:
    """A segment in words; None where it has none.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        segment: in tokens.
    """
    text = decode_text(tokenizer, segment.token_ids)
    if not text:
        return None
    return Segment(round(segment.start_seconds, _DECIMALS), round(segment.end_seconds, _DECIMALS), text)


def decode_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The words of tokens, without special tokens and without blanks at the ends. Times must not be among them.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        token_ids: of text; all of a sound at once, because a character may lie across the end of a segment.
    """
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text.strip()
