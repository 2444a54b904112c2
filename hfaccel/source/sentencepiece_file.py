"""Reads what a tokenizer needs of a sentencepiece model: a protobuf message, so that its library is not needed for it.

Numbers of fields: ``sentencepiece_model.proto`` (Kudo and Richardson, "SentencePiece", EMNLP 2018). Wire format:
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfaccel.errors import SourceError

UNIGRAM = 1
"""Of ``model_type``; 2 is BPE."""
NORMAL, USER_DEFINED = 1, 4
"""Types of pieces that text is made of; the others are control signs, the unknown piece, bytes, and what is not used."""
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5

Value = int | bytes


@dataclass(frozen=True)
class SentencePieceModel:
    """A sentencepiece model.

    Attributes:
        scores: of each piece that text is made of, its logarithmic probability.
        model_type: :data:`UNIGRAM` or another.
        character_map: what its normalizer replaces, as the ``tokenizers`` library reads it; empty where it replaces nothing.
        adds_prefix: whether a blank goes before the text.
        removes_spaces: whether blanks at the ends go, and several in a row become one.
    """

    scores: dict[str, float]
    model_type: int
    character_map: bytes
    adds_prefix: bool
    removes_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a ``.spm`` or ``.model`` file.

    Raises:
        SourceError: it cannot be read, or is no sentencepiece model.
    """
    try:
        pieces, trainer, normalizer = [], {}, {}
        for field, value in _fields(path.read_bytes()):
            if field == 1 and isinstance(value, bytes):
                pieces.append(dict(_fields(value)))
            elif field == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif field == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
        scores = {
            _bytes(piece[1]).decode("utf-8"): float(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            for piece in pieces
            if piece.get(3, NORMAL) in (NORMAL, USER_DEFINED)
        }
        if not scores:
            raise ValueError("it has no pieces")
        return SentencePieceModel(
            scores,
            int(trainer.get(3, UNIGRAM)),
            _bytes(normalizer.get(2, b"")),
            adds_prefix=bool(normalizer.get(3, 1)),
            removes_spaces=bool(normalizer.get(4, 1)),
        )
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise SourceError(f"is no sentencepiece model: {error}", where=str(path), hint="download the checkpoint again") from error


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message; of a float its four bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == _VARINT:
            value: Value
            value, place = _varint(message, place)
        else:
            size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
            if size is None:
                if kind != _LENGTH:
                    raise ValueError(f"field {key >> 3} is of an unknown kind")
                size, place = _varint(message, place)
            value = message[place : place + size]
            if len(value) < size:
                raise ValueError("it ends in the middle of a field")
            place += size
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[place]
        place += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, place


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number where it should be a text")
    return value
