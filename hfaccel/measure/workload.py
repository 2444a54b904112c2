"""What a model will be asked: a grid of batch x sequence length, and inputs of those shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.errors import SettingsError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POINT = re.compile(r"([1-9][0-9]{0,6})\s*[xX]\s*([1-9][0-9]{0,6})")
_EXAMPLE = "write batch x sequence length, for example 1x16,1x128,8x128"
_RETRIES_FOR_A_NEW_TEXT = 8

# Everyday words of one to three tokens in most vocabularies, so that a text can be brought close to any length.
_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment air
teacher force education film music battery screen delivery quality
""".split()  # noqa: SIM905 -- a list of a hundred literals would hide the words


@dataclass(frozen=True, order=True)
class Point:
    """One point of a workload: ``batch`` examples of ``sequence`` tokens each, special tokens included."""

    batch: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.sequence}"


def parse_workload(text: str | Sequence[str]) -> tuple[Point, ...]:
    """Read a workload such as ``"1x16,8x128"`` or ``["1x16", "8x128"]``.

    Args:
        text: points separated by commas, or one point (or several) per item. Repeated points count once.

    Returns:
        The points in the order given.

    Raises:
        UsageError: a part is not ``BATCHxLENGTH`` with both at least 1, or there is none.
    """
    items: Iterable[str] = [text] if isinstance(text, str) else text
    parts = [part.strip() for item in items for part in item.split(",") if part.strip()]
    if not parts:
        raise UsageError("the workload is empty", where="workload", hint=_EXAMPLE)
    return tuple(dict.fromkeys(_parse_point(part) for part in parts))


def fit_workload(points: Sequence[Point], max_length: int) -> tuple[Point, ...]:
    """The points with sequences cut to what the model takes, as its tokenizer would cut the texts; repeated points count once."""
    return tuple(dict.fromkeys(Point(point.batch, min(point.sequence, max_length)) for point in points))


def _parse_point(part: str) -> Point:
    match = _POINT.fullmatch(part)
    if match is None:
        raise UsageError(f"'{part}' is not a point of a workload", where="workload", hint=_EXAMPLE)
    return Point(batch=int(match[1]), sequence=int(match[2]))


def make_feeds(point: Point, input_names: Sequence[str], *, vocabulary_size: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Graph inputs of shape ``[batch, sequence]``: random valid token ids, a full mask, token types zero.

    Args:
        point: shape to make.
        input_names: of ``input_ids``, ``attention_mask`` and ``token_type_ids`` those that the graph reads.
        vocabulary_size: ids are drawn from ``[0, vocabulary_size)``.
        seed: the same seed gives the same ids.

    Raises:
        SettingsError: the graph has an input that is none of the three.
    """
    shape = (point.batch, point.sequence)
    random = np.random.default_rng(seed)
    makers: dict[str, Callable[[], NDArray[np.int64]]] = {
        "input_ids": lambda: random.integers(0, vocabulary_size, shape, dtype=np.int64),
        "attention_mask": lambda: np.ones(shape, dtype=np.int64),
        "token_type_ids": lambda: np.zeros(shape, dtype=np.int64),
    }
    unknown = [name for name in input_names if name not in makers]
    if unknown:
        raise SettingsError(
            f"no way to make up values for the graph input '{unknown[0]}'",
            where="graph inputs",
            hint=f"known inputs: {', '.join(makers)}",
        )
    return {name: makers[name]() for name in input_names}


def make_texts(point: Point, count_tokens: Callable[[str], int], *, seed: int) -> tuple[str, ...]:
    """``point.batch`` different texts of about ``point.sequence`` tokens, for runs from text to answer.

    Each text is the longest run of everyday words that does not exceed the length, and at least one word. All texts differ, so
    that a cache of encoded texts does not flatter whoever has one.

    Args:
        point: how many texts, and how long.
        count_tokens: tokens of one text, special tokens included.
        seed: the same seed gives the same texts.
    """
    random = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    retries = 0
    while len(texts) < point.batch:
        words = [_WORDS[index] for index in random.integers(0, len(_WORDS), point.sequence)]
        text = " ".join(words[: longest_fit(words, point.sequence, count_tokens)])
        if text in texts:
            # Very short texts run out of different words; a number costs a token or two and is always new.
            retries += 1
            if retries > _RETRIES_FOR_A_NEW_TEXT:
                text = f"{text} {len(texts)}"
        texts[text] = None
    return tuple(texts)


def longest_fit(words: Sequence[str], limit: int, count_tokens: Callable[[str], int]) -> int:
    """How many leading words fit into ``limit`` tokens, at least one (bisection: each word is at least one token)."""
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if count_tokens(" ".join(words[:middle])) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
