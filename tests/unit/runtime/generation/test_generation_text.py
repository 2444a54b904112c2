from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hfaccel.runtime.generation.detokenizer import AnswerText, Detokenizer, StopFilter

MARK = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.sampled_from("ab €日本🙂é \n▁x"), max_size=30)
SOME_IDS = st.lists(st.integers(0, 399), max_size=40)


def byte_level(folder: Path) -> Any:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def byte_fallback() -> Any:
    """As Llama 2 and Gemma have it: spaces as marks, unknown characters as bytes, the first space of a text dropped."""
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], initial_alphabet=list("ab▁"), show_progress=False
    )
    tokenizer.train_from_iterator(["▁aa▁ab▁ba▁bb▁▁ab▁▁▁aba"], trainer)
    # The trainer takes the bytes for special tokens, which they are not.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [item for item in data["added_tokens"] if item["content"] not in byte_tokens]
    return Tokenizer.from_str(json.dumps(data))


def metaspace() -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(["aa ab ba bb  ab", "x abba € 日本"], trainer)
    return tokenizer


@pytest.fixture(scope="session", params=["byte-level", "byte-fallback", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Any:
    kinds = {"byte-level": lambda: byte_level(tokenizer_folder), "byte-fallback": byte_fallback, "metaspace": metaspace}
    return kinds[request.param]()


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@settings(max_examples=400)
@given(text=TEXTS)
def test_pieces_of_a_text_are_whole_and_make_it_up(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(MARK in piece for piece in pieces)


@settings(max_examples=400)
@given(ids=SOME_IDS)
def test_pieces_of_any_ids_make_up_what_they_decode_to(tokenizer: Any, ids: list[int]) -> None:
    known = [token for token in ids if token < tokenizer.get_vocab_size()]
    assert "".join(pieces_of(tokenizer, known)) == tokenizer.decode(known)


@settings(max_examples=300)
@given(ids=SOME_IDS)
def test_no_piece_ends_within_a_character(tokenizer: Any, ids: list[int]) -> None:
    known = [token for token in ids if token < tokenizer.get_vocab_size()]
    assert not any(piece.endswith(MARK) for piece in pieces_of(tokenizer, known)[:-1])


def test_text_comes_as_soon_as_it_is_whole(tokenizer_folder: Path) -> None:
    tokenizer = byte_level(tokenizer_folder)
    ids = tokenizer.encode("fox 🜁!", add_special_tokens=False).ids
    pieces = pieces_of(tokenizer, ids)
    assert pieces[0] == tokenizer.decode(ids[:1])
    assert [piece for piece in pieces if "🜁" in piece] == ["🜁"]
    assert pieces[-1] == ""


def test_special_tokens_are_skipped_or_shown(tokenizer_folder: Path) -> None:
    tokenizer = byte_level(tokenizer_folder)
    ids = tokenizer.encode("fox").ids
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(map(shown.push, ids)) == "<s>fox"
    assert "".join(pieces_of(tokenizer, ids)) == "fox"


def cut(text: str, stop: list[str]) -> str:
    """The reference: read character by character until some stop string is complete."""
    for end in range(len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


WORDS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@settings(max_examples=500)
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=12), stop=WORDS)
def test_a_text_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    found = StopFilter(stop)
    text = "".join(pieces)
    given_so_far = ""
    for place, piece in enumerate(pieces):
        given_so_far += found.push(piece)
        assert cut(text, stop).startswith(given_so_far)
        if not found.stopped:  # no more is held back than may still become a stop string
            held = "".join(pieces[: place + 1])[len(given_so_far) :]
            assert held == "" or any(word.startswith(held) for word in stop)
    assert given_so_far + found.finish() == cut(text, stop)
    assert found.stopped == (cut(text, stop) != text)


@settings(max_examples=300)
@given(text=TEXTS, stop=st.lists(st.text(st.sampled_from("ab €🙂"), min_size=1, max_size=3), max_size=2))
def test_stop_strings_reach_over_tokens(tokenizer: Any, text: str, stop: list[str]) -> None:
    ids = tokenizer.encode(text).ids
    answer = AnswerText(tokenizer, stop)
    assert "".join([*map(answer.push, ids), answer.finish()]) == cut(tokenizer.decode(ids), stop)
