from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hfaccel.artifact.contract import TextSettings
from hfaccel.errors import DataError, IntegrityError
from hfaccel.runtime.tokenizer import CacheInfo, TextTokenizer


def test_padding_and_truncation_of_the_file_are_off(tokenizer_file: Path, text_settings: TextSettings) -> None:
    encoded = TextTokenizer(tokenizer_file, text_settings).encode(["the dog jumps over the lazy fox"])[0]
    assert 5 < encoded.ids.size < 64
    assert 0 not in encoded.ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_named_side(
    tokenizer_file: Path, text_settings: TextSettings, transformers_tokenizer: Any, side: str
) -> None:
    ours = TextTokenizer(tokenizer_file.parent, replace(text_settings, max_length=9, truncation_side=side))
    text = "the quick brown fox jumps over the lazy dog while it rains"
    pair = (text, "Anna moved there from Paris")
    transformers_tokenizer.truncation_side = side
    try:
        options = {"truncation": True, "max_length": 9}
        single = transformers_tokenizer(text, **options)["input_ids"]
        double = transformers_tokenizer(*pair, **options)
    finally:
        transformers_tokenizer.truncation_side = "right"
    one, two = ours.encode([text, pair])
    assert one.ids.tolist() == single
    assert two.ids.tolist() == double["input_ids"]
    assert two.type_ids.tolist() == double["token_type_ids"]


def test_cache_counts_hits_and_forgets_the_oldest(tokenizer_file: Path, text_settings: TextSettings) -> None:
    tokenizer = TextTokenizer(tokenizer_file, text_settings, cache_size=2)
    assert tokenizer.cache_info().hit_rate == 0
    first = tokenizer.encode(["a", "dog", "a"])
    assert first[0] is first[2]
    assert tokenizer.cache_info() == CacheInfo(hits=1, misses=2, size=2)
    tokenizer.encode(["a"])
    tokenizer.encode(["fox"])  # pushes out "dog", used longest ago
    assert tokenizer.encode(["a"])[0] is first[0]
    tokenizer.encode(["dog"])
    info = tokenizer.cache_info()
    assert info == CacheInfo(hits=3, misses=4, size=2)
    assert info.hit_rate == pytest.approx(3 / 7)


def test_a_call_larger_than_the_cache_answers_all(tokenizer_file: Path, text_settings: TextSettings) -> None:
    tokenizer = TextTokenizer(tokenizer_file, text_settings, cache_size=0)
    assert len(tokenizer.encode(["a", "dog", "fox"])) == 3
    assert tokenizer.cache_info().size == 0


def test_cached_arrays_cannot_be_changed(tokenizer_file: Path, text_settings: TextSettings) -> None:
    encoded = TextTokenizer(tokenizer_file, text_settings).encode(["dog"])[0]
    with pytest.raises(ValueError, match="read-only"):
        encoded.ids[0] = 3


def test_threads_share_a_tokenizer(tokenizer_file: Path, text_settings: TextSettings) -> None:
    tokenizer = TextTokenizer(tokenizer_file, text_settings, cache_size=3)
    texts = ["the dog", "a fox", "it rains", "Paris", "New York"] * 20
    expected = [item.ids.tolist() for item in TextTokenizer(tokenizer_file, text_settings).encode(texts)]
    context = "dog fox rains " * 60

    def work(number: int) -> list[list[int]]:
        if number % 2:
            tokenizer.encode_windows("who", context, 4, 16)
        return [item.ids.tolist() for item in tokenizer.encode(texts)]

    with ThreadPoolExecutor(4) as pool:
        assert all(result == expected for result in pool.map(work, range(12)))
    info = tokenizer.cache_info()
    assert info.hits + info.misses == 12 * len(texts)
    assert info.size == 3


def test_lowercase_is_done_before_the_tokenizer(tokenizer_file: Path, text_settings: TextSettings) -> None:
    tokenizer = TextTokenizer(tokenizer_file, replace(text_settings, lowercase=True))
    upper, lower = tokenizer.encode([("DOG", "FOX"), ("dog", "fox")])
    assert upper.ids.tolist() == lower.ids.tolist()


def test_words_keep_their_numbers(tokenizer_file: Path, text_settings: TextSettings) -> None:
    encoded = TextTokenizer(tokenizer_file, text_settings).encode_words(["Anna", "quickly", "jumps"])
    assert encoded.word_ids[0] is encoded.word_ids[-1] is None
    assert set(encoded.word_ids[1:-1]) == {0, 1, 2}
    assert encoded.special_tokens_mask[0] == encoded.special_tokens_mask[-1] == 1


def test_windows_overlap_and_cover_the_context(tokenizer_file: Path, text_settings: TextSettings) -> None:
    tokenizer = TextTokenizer(tokenizer_file, text_settings)
    context = "the quick brown fox jumps over the lazy dog while it rains " * 4
    windows = tokenizer.encode_windows("what jumps", context, 5, 24)
    spans = [[offset for offset, seq in zip(w.offsets, w.sequence_ids, strict=True) if seq == 1] for w in windows]
    assert len(windows) > 3
    assert all(window.ids.size <= 24 for window in windows)
    assert all(left[-5:] == right[:5] for left, right in pairwise(spans))
    whole = tokenizer.encode_windows("what jumps", "", 5)
    assert len(whole) == 1
    assert sorted({offset for span in spans for offset in span})[0] == (0, 3)
    assert spans[-1][-1][1] == len(context.rstrip())


def test_a_question_that_fills_the_window_is_refused(tokenizer_file: Path, text_settings: TextSettings) -> None:
    tokenizer = TextTokenizer(tokenizer_file, text_settings)
    with pytest.raises(DataError) as caught:
        tokenizer.encode_windows("dog " * 70, "a fox", 16)
    assert caught.value.what == "the question has 70 tokens and leaves no room for the context in a window of 64 tokens"
    assert caught.value.hint == "ask a shorter question"


def test_missing_and_damaged_files(tmp_path: Path, text_settings: TextSettings) -> None:
    with pytest.raises(IntegrityError, match="the tokenizer file is missing"):
        TextTokenizer(tmp_path, text_settings)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match="the tokenizer file cannot be read"):
        TextTokenizer(tmp_path, text_settings)
