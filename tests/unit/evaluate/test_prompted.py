"""Prompts with expected answers as a decoder reads them: which tokens are scored, and when an answer ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hfaccel.evaluate.example import Example
from hfaccel.evaluate.prompted import AnswerLimits, PromptReader
from hfaccel.runtime.tokenizer import open_tokenizer

EXAMPLE = Example("word1 word2", answers=("word3 word4", "word9"))


@pytest.fixture
def folder(tmp_path: Path, write_tokenizer: Callable[..., None]) -> Path:
    write_tokenizer(tmp_path, words=50)
    return tmp_path


def test_the_first_answer_is_scored_and_the_prompt_is_not(folder: Path) -> None:
    tokenizer = open_tokenizer(folder / "tokenizer.json")
    window = PromptReader(folder).window(7, EXAMPLE)
    assert list(window.ids) == tokenizer.encode("word1 word2 word3 word4").ids
    scored = [tokenizer.id_to_token(number) for number in window.ids[window.first :]]
    assert scored[:2] == ["word3", "word4"]
    assert window.cluster == 7


def test_of_a_chat_model_the_template_is_around_the_prompt(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("word5 {{ messages[0].content }} word6 ", encoding="utf-8")
    reader, tokenizer = PromptReader(folder), open_tokenizer(folder / "tokenizer.json")
    window = reader.window(0, EXAMPLE)
    read = [tokenizer.id_to_token(number) for number in window.ids]
    assert read == ["word5", "word1", "word2", "word6", "word3", "word4"]  # the template alone has special tokens
    assert window.first == 4
    assert reader.prompt(EXAMPLE) == [{"role": "user", "content": "word1 word2"}]


def test_answers_may_be_longer_than_their_references_but_not_by_much(folder: Path) -> None:
    reader = PromptReader(folder)
    assert reader.limits([EXAMPLE]) == AnswerLimits(2 * 2 + 8, ("\n",))
    assert reader.limits([Example("a", answers=("word1 " * 300,))]).max_new_tokens == 128
    assert reader.limits([EXAMPLE, Example("a", answers=("word1\nword2",))]).stop == ()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert PromptReader(folder).limits([EXAMPLE]).stop == ()
