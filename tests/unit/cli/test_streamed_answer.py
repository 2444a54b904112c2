"""``hfaccel run --stream``: the answer alone on standard output, how long it took on standard error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, models, pre_tokenizers

from hfaccel.cli.answers import show_answers, show_transcripts
from hfaccel.cli.generation import show_generation
from hfaccel.cli.output import Output
from hfaccel.errors import UsageError


class Speaker:
    """Says the same three words to everybody."""

    def __init__(self, *pieces: str) -> None:
        self.chat_template = SimpleNamespace(exists=False)
        self.tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2, "[UNK]": 3}, unk_token="[UNK]"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self._pieces = pieces

    def generate(self, _prompt: str, *, stream: bool) -> Iterator[str]:
        assert stream
        yield from self._pieces


def shown(model: Any, texts: list[str]) -> None:
    show_generation(Output(), model, texts, {}, system=None, raw=False, stream=True)


def test_the_answer_goes_to_one_stream_and_its_speed_to_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Speaker("one", " two", " three"), ["Count."])
    out, err = capsys.readouterr()
    assert out == "one two three\n"
    assert re.fullmatch(r"about 3 tokens: the first after 0\.\d\d s, then \d+ a second\n", err)


def test_an_answer_without_words_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Speaker(), ["Count."])
    assert re.fullmatch(r"about 0 tokens: the first after 0\.\d\d s\n", capsys.readouterr().err)


def test_only_one_answer_can_be_watched() -> None:
    with pytest.raises(UsageError, match="one text"):
        shown(Speaker("one"), ["a", "b"])


class Translator:
    """Says two words, of which its tokenizer makes three tokens."""

    tokenizer = SimpleNamespace(encode=lambda texts: [SimpleNamespace(ids=np.arange(3)) for _ in texts])

    def generate(self, _text: str, *, stream: bool) -> Iterator[str]:
        assert stream
        yield from ("zwei", " Worte")


def test_so_it_is_with_an_encoder_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Translator()
    show_answers(Output(), model, ["two words"], {}, stream=True)
    out, err = capsys.readouterr()
    assert out == "zwei Worte\n"
    assert re.fullmatch(r"about 3 tokens: the first after 0\.\d\d s, then \d+ a second\n", err)


def test_of_speech_the_seconds_of_sound_are_compared_with_those_that_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, np.zeros(24_000, dtype=np.float32), 16_000)
    model: Any = SimpleNamespace(transcribe=lambda file, stream: iter(["said", " so"]) if stream and file == str(sound) else None)
    show_transcripts(Output(), model, [str(sound)], {}, stream=True)
    out, err = capsys.readouterr()
    assert out == "said so\n"
    assert re.fullmatch(r"1\.5 s of sound in 0\.\d\d s: real-time factor 0\.\d{3}\n", err)
