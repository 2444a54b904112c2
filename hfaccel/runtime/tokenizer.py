"""Text to ids with the Rust ``tokenizers`` library, behind a cache; padding and truncation are ours, never the file's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hfaccel.artifact.contract import TextSettings
from hfaccel.errors import DataError, IntegrityError

Text = str | tuple[str, str]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenized text or pair, truncated but not padded; n is its length in tokens.

    Attributes:
        ids: int64 [n], read-only.
        type_ids: int64 [n], read-only.
        special_tokens_mask: n numbers, 1 where the token was added by the tokenizer.
        offsets: n (start, end) pairs of characters in the text (or word, for pre-tokenized words) of the token.
        word_ids: n word numbers, None for special tokens.
        sequence_ids: n numbers, 0 = first text, 1 = second text, None = special token.
    """

    ids: np.ndarray
    type_ids: np.ndarray
    special_tokens_mask: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    word_ids: tuple[int | None, ...]
    sequence_ids: tuple[int | None, ...]


@dataclass(frozen=True)
class CacheInfo:
    """Use of the token cache: lookups answered and not answered, and the texts held now."""

    hits: int
    misses: int
    size: int

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, 0 to 1; 0 before the first lookup."""
        return self.hits / max(self.hits + self.misses, 1)


class TextTokenizer:
    """A tokenizer as the contract wants it. May be shared by threads.

    Args:
        folder_or_file: ``tokenizer.json`` or the folder that holds it.
        settings: text handling of the contract.
        cache_size: texts (or pairs) kept tokenized; 0 switches the cache off.

    Raises:
        IntegrityError: the file is missing or not a tokenizer.
    """

    def __init__(self, folder_or_file: Path, settings: TextSettings, cache_size: int = 4096) -> None:
        self.settings = settings
        path = folder_or_file / "tokenizer.json" if folder_or_file.is_dir() else folder_or_file
        self._tokenizer = open_tokenizer(path)
        self._tokenizer.enable_truncation(settings.max_length, direction=settings.truncation_side)
        # Windows need another truncation; setting it on the shared tokenizer would race with encode in other threads.
        self._window_tokenizer: Any = None
        self._lock = Lock()
        self._window_lock = Lock()
        self._cache: OrderedDict[Text, Encoded] = OrderedDict()
        self._cache_size = cache_size
        self._hits = 0
        self._misses = 0

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokenize texts or pairs, truncated to ``max_length`` (of a pair the longer text first), in the given order."""
        found: dict[Text, Encoded] = {}
        missing: dict[Text, None] = {}
        with self._lock:
            for text in texts:
                if text in found or text in missing:
                    self._hits += 1
                elif (cached := self._cache.get(text)) is not None:
                    self._cache.move_to_end(text)
                    found[text] = cached
                    self._hits += 1
                else:
                    missing[text] = None
                    self._misses += 1
        if missing:
            new = list(missing)
            lower = self.settings.lowercase
            encodings = _encode_all(self._tokenizer, [_lower(text) for text in new] if lower else new)
            fresh = dict(zip(new, map(_encoded, encodings), strict=True))
            found.update(fresh)
            self._remember(fresh)
        return [found[text] for text in texts]

    def encode_words(self, words: Sequence[str]) -> Encoded:
        """Tokenize words that are split already (datasets for token classification); ``word_ids`` index ``words``."""
        given = [word.lower() for word in words] if self.settings.lowercase else list(words)
        return _encoded(self._tokenizer.encode(given, is_pretokenized=True))

    def encode_windows(self, question: str, context: str, stride: int, max_length: int | None = None) -> list[Encoded]:
        """Tokenize a question with every window of its context; the question is never cut.

        Models that pad on the left read the context first (``sequence_ids`` tells which tokens are whose).

        Args:
            question: goes whole into every window.
            context: cut into windows of what is left of the length.
            stride: tokens that neighbouring windows share; half a window where the windows are too short for it.
            max_length: tokens of a window, special tokens included; never more than the contract's.

        Raises:
            DataError: the question leaves no room for the context.
        """
        question_first = self.settings.padding_side == "right"
        length = min(max_length or self.settings.max_length, self.settings.max_length)
        pair = (question, context) if question_first else (context, question)
        if self.settings.lowercase:
            pair = (pair[0].lower(), pair[1].lower())
        with self._window_lock:
            if self._window_tokenizer is None:
                self._window_tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
            tokenizer = self._window_tokenizer
            tokenizer.no_truncation()
            asked = len(tokenizer.encode(question, add_special_tokens=False).ids)
            room = length - asked - tokenizer.num_special_tokens_to_add(True)
            if room < 1:
                raise DataError(
                    f"the question has {asked} tokens and leaves no room for the context in a window of {length} tokens",
                    where=f"question {question[:40]!r}",
                    hint="ask a shorter question",
                )
            strategy = "only_second" if question_first else "only_first"
            tokenizer.enable_truncation(length, stride=stride if stride < room else room // 2, strategy=strategy)
            encoding = tokenizer.encode(*pair)
        return [_encoded(window) for window in (encoding, *encoding.overflowing)]

    def cache_info(self) -> CacheInfo:
        """Use of the cache since the start."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, len(self._cache))

    def token(self, token_id: int) -> str:
        """The vocabulary entry of an id, empty when there is none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def join(self, tokens: Sequence[str]) -> str:
        """Vocabulary entries back to text."""
        decoder = self._tokenizer.decoder
        text: str = decoder.decode(list(tokens)) if decoder is not None else " ".join(tokens)
        return text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids back to text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def library_tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` itself, for those who decode ids one by one; it truncates what it encodes."""
        return self._tokenizer

    @property
    def marks_subwords(self) -> bool:
        """Whether pieces inside a word carry a prefix such as ``##``."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    @property
    def unknown_id(self) -> int | None:
        """Id of the unknown token, None when there is none."""
        # Unigram models do not tell their unknown token; these are the names in use.
        names = (getattr(self._tokenizer.model, "unk_token", None), "<unk>", "[UNK]")
        ids = (self._tokenizer.token_to_id(name) for name in names if name)
        return next((token_id for token_id in ids if token_id is not None), None)

    def _remember(self, fresh: dict[Text, Encoded]) -> None:
        with self._lock:
            self._cache.update(fresh)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)


def open_tokenizer(path: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a ``tokenizer.json``, without the padding and truncation that the file may ask for.

    Raises:
        IntegrityError: the file is missing or not a tokenizer.
    """
    if not path.is_file():
        raise IntegrityError("the tokenizer file is missing", where=str(path), hint="compile the model again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise IntegrityError(
            f"the tokenizer file cannot be read: {error}",
            where=str(path),
            hint="it must be the tokenizer.json of a fast tokenizer; compile the model again",
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_characters(text: str) -> None:
    """Say it plainly when a text holds what is no character: halves of one, as bytes that are no UTF-8 become on a command line.

    Raises:
        DataError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds what is no character: {text[error.start : error.end]!r} at place {error.start}",
            hint="give it as UTF-8",
        ) from error


def _encode_all(tokenizer: Any, texts: Sequence[Text]) -> list[Any]:
    try:
        encodings: list[Any] = tokenizer.encode_batch(list(texts))
    except TypeError as error:  # the library's own words name neither the text nor what is wrong with it
        for text in texts:
            for part in (text,) if isinstance(text, str) else text:
                if not isinstance(part, str):
                    raise DataError(f"a text is a str, not {type(part).__name__}", hint="give a text") from error
                check_characters(part)
        raise
    return encodings


def _encoded(encoding: Any) -> Encoded:
    return Encoded(
        ids=_frozen_array(encoding.ids),
        type_ids=_frozen_array(encoding.type_ids),
        special_tokens_mask=tuple(encoding.special_tokens_mask),
        offsets=tuple(encoding.offsets),
        word_ids=tuple(encoding.word_ids),
        sequence_ids=tuple(encoding.sequence_ids),
    )


def _frozen_array(values: list[int]) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False  # the cache hands the same array to every caller
    return array


def _lower(text: Text) -> Text:
    return text.lower() if isinstance(text, str) else (text[0].lower(), text[1].lower())
