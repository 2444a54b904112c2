"""A ``tokenizer.json`` for Marian checkpoints (opus-mt), which have two sentencepiece models and a ``vocab.json``.

transformers reads a source text with the pieces of ``source.spm`` and gives each the id that ``vocab.json`` has for it; answers are
put together from the pieces of ``vocab.json``. Its tokenizer is written in Python and has no ``tokenizer.json``, so it is built here:
a Unigram model over the ids of ``vocab.json``. Pieces that only answers have are marked, so that no source text is read as one of
them, and the decoder takes the mark off. One thing remains different: transformers gives a run of characters that ``source.spm``
does not know the id of an answers' piece where both happen to be the same. Here that holds for single characters; longer runs are
unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfaccel.errors import SourceError
from hfaccel.source.model import read_object
from hfaccel.source.sentencepiece_file import UNIGRAM, SentencePieceModel, read_sentencepiece

SOURCE_FILE, TARGET_FILE, VOCABULARY_FILE = "source.spm", "target.spm", "vocab.json"
INPUTS = ("input_ids", "attention_mask")
UNKNOWN, END, PAD = "<unk>", "</s>", "<pad>"
_MARK, _MARK_ALONE, _INSTEAD_OF_MARK = "\ue000", "\ue001", "\ue002"
"""Of answers' pieces; of those of one character; what a text has that has a mark. All of the private use area, which says nothing."""
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""Sentencepiece's sign for a blank."""
_OUTER_BLANKS = r"\A +| +\z"


@dataclass(frozen=True)
class MarianTokenizer:
    """The tokenizer of a Marian checkpoint.

    Attributes:
        tokenizer: a ``tokenizers.Tokenizer``.
        left_out: pieces of ``source.spm`` that ``vocab.json`` does not have.
    """

    tokenizer: Any
    left_out: tuple[str, ...]


def is_marian(folder: Path) -> bool:
    """Whether the folder has the files of a Marian tokenizer, and no ``tokenizer.json``."""
    needed = (SOURCE_FILE, TARGET_FILE, VOCABULARY_FILE)
    return all((folder / name).is_file() for name in needed) and not (folder / "tokenizer.json").is_file()


def marian_vocabulary(folder: Path) -> dict[str, int]:
    """Ids of ``vocab.json``.

    Raises:
        SourceError: it has no ids, or two vocabularies stand beside each other.
    """
    if read_object(folder / "tokenizer_config.json").get("separate_vocabs"):
        raise SourceError(
            "source and answers have a vocabulary each (separate_vocabs), which is not supported",
            where=str(folder),
            hint="use a checkpoint with one vocab.json for both",
        )
    path = folder / VOCABULARY_FILE
    found = read_object(path)
    if UNKNOWN not in found or END not in found or not all(isinstance(number, int) for number in found.values()):
        raise SourceError(f"has no ids of {UNKNOWN} and {END}", where=str(path), hint="download the checkpoint again")
    return {str(piece): int(number) for piece, number in found.items()}


def build_tokenizer(folder: Path) -> MarianTokenizer:
    """Build the tokenizer of a folder that :func:`is_marian`.

    Raises:
        SourceError: a file is damaged, or the sentencepiece model is none that the ``tokenizers`` library can follow.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary, source = marian_vocabulary(folder), read_sentencepiece(folder / SOURCE_FILE)
    if source.model_type != UNIGRAM:
        raise SourceError(
            "the sentencepiece model is no Unigram model, which is what Marian checkpoints have",
            where=str(folder / SOURCE_FILE),
            hint="add a tokenizer.json to the checkpoint folder",
        )
    codes = [piece for piece in vocabulary if piece.startswith(">>") and piece.endswith("<<")]
    special = [token for token in (END, UNKNOWN, PAD) if token in vocabulary]
    rows = _rows(vocabulary, source, {*codes, *special})
    tokenizer = Tokenizer(models.Unigram(rows, unk_id=vocabulary[UNKNOWN], byte_fallback=False))
    tokenizer.normalizer = _normalizer(source, vocabulary)
    scheme = "always" if source.adds_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme=scheme, split=False)
    ends = [(END, vocabulary[END])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", pair=f"$A $B {END}", special_tokens=ends)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_MARK, ""),
            decoders.Replace(_MARK_ALONE, ""),
            decoders.Replace(_BLANK, " "),
            decoders.Fuse(),
            decoders.Replace(Regex(_OUTER_BLANKS), ""),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(code, normalized=False, special=False) for code in codes])
    return MarianTokenizer(tokenizer, tuple(piece for piece in source.scores if piece not in vocabulary))


def _rows(vocabulary: dict[str, int], source: SentencePieceModel, kept: set[str]) -> list[tuple[str, float]]:
    """Piece and score of each id; what no source text may be read as is marked."""
    # Of what is not known a score is made from the lowest one, so that none may be lower than the model's.
    lowest = min(source.scores.values())
    rows = [(f"{_MARK}{number}", lowest) for number in range(max(vocabulary.values()) + 1)]
    for piece, number in vocabulary.items():
        if number < 0:
            raise SourceError(f"has the id {number}", where=VOCABULARY_FILE, hint="download the checkpoint again")
        known = piece in source.scores or piece in kept
        mark = "" if known else _MARK_ALONE if len(piece) == 1 else _MARK
        rows[number] = (mark + piece, source.scores.get(piece, lowest))
    return rows


def _normalizer(source: SentencePieceModel, vocabulary: dict[str, int]) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Replace(mark, _INSTEAD_OF_MARK) for mark in (_MARK, _MARK_ALONE)]
    if source.character_map:
        steps.append(normalizers.Precompiled(source.character_map))
    if source.removes_spaces:
        steps += [normalizers.Replace(Regex(_OUTER_BLANKS), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    known = {" ", *(piece for piece in source.scores if len(piece) == 1)}
    foreign = {piece for piece in vocabulary if len(piece) == 1} - known
    if foreign:
        # A mark before each that stands alone among known characters: so it is read as the answers' piece.
        steps.append(normalizers.Replace(Regex(f"(?<![^{_hex(known)}])(?=[{_hex(foreign)}](?![^{_hex(known)}]))"), _MARK_ALONE))
    return normalizers.Sequence(steps)


def _hex(characters: set[str]) -> str:
    """For a class of characters in a regular expression."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in sorted(characters))
