"""A model of many languages, with NLLB's own tokenizer: it translates from and into the language that it is asked for."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hfaccel
from hfaccel.errors import UsageError
from hfaccel.runtime.generation.languages import find_language
from hfaccel.runtime.generation.text_to_text import TextToTextModel

OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed, so no candidate is dropped for its speed."""
LANGUAGES = ["deu_Latn", "eng_Latn", "fra_Latn", "srp_Cyrl", "srp_Latn"]
TEXTS = ["a cat sat on the mat", "why", "the dog ran home again"]
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "num_beams": 1, "no_repeat_ngram_size": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, enlarge: Callable[[Any], None]) -> Path:
    """A tiny random NLLB which reads letters."""
    folder = tmp_path_factory.mktemp("nllb")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = transformers.NllbTokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=LANGUAGES, src_lang="eng_Latn", model_max_length=48
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.M2M100Config(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, scale_embedding=True,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(config)
    enlarge(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    pairs = folder / "pairs.csv"
    pairs.write_text("source,target\n" + "".join(f"{text},{text[::-1]}\n" for text in TEXTS), encoding="utf-8")
    hfaccel.compile(
        checkpoint, output=folder / "out", data=pairs, target=OFF_TARGET, overrides=("quantize.enabled=false",), use_cache=False
    )
    return folder / "out"


def translations_of_transformers(checkpoint: Path, source: str, target: str) -> list[str]:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, src_lang=source)
    forced = tokenizer.convert_tokens_to_ids(target)
    given = [
        model.generate(**tokenizer(text, return_tensors="pt"), **GREEDY, do_sample=False, forced_bos_token_id=forced)[0]
        for text in TEXTS
    ]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in given]


def test_answers_are_those_of_transformers_in_each_language(checkpoint: Path, compiled: Path) -> None:
    model = hfaccel.load(compiled)
    assert isinstance(model, TextToTextModel)
    assert sorted(model.languages) == LANGUAGES
    seen = set()
    for source, target in (("eng_Latn", "fra_Latn"), ("eng_Latn", "deu_Latn"), ("deu_Latn", "fra_Latn")):
        expected = translations_of_transformers(checkpoint, source, target)
        asked: dict[str, Any] = {"source_language": source, "target_language": target, **GREEDY}
        assert [model.generate(text, **asked) for text in TEXTS] == expected
        assert model.generate(TEXTS, **asked) == expected
        seen.add(tuple(expected))
    assert len(seen) == 3, "languages make no difference: nothing is compared"
    unmarked = model.generate(TEXTS, target_language="fra", **GREEDY)
    assert unmarked == translations_of_transformers(checkpoint, "eng_Latn", "fra_Latn"), "the tokenizer marks English by itself"


def test_beams_begin_with_the_language_too(checkpoint: Path, compiled: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    wishes = {**GREEDY, "num_beams": 3}
    ids = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **wishes, forced_bos_token_id=tokenizer.vocab["deu_Latn"])
    answer = hfaccel.load(compiled).generate(TEXTS[0], **wishes, target_language="deu")
    assert answer == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_the_command_line_takes_languages(compiled: Path, command_line: Callable[..., Any]) -> None:
    options = ("--source-language", "deu_Latn", "--target-language", "fra_Latn", "--num-beams", "1", "--json")
    finished = command_line("run", compiled, TEXTS[0], *options)
    assert finished.code == 0, finished.err
    expected = hfaccel.load(compiled).generate(TEXTS[0], source_language="deu", target_language="fra", num_beams=1)
    assert json.loads(finished.out)[0]["answer"] == expected


@pytest.mark.parametrize(("given", "says"), [("srp", "srp_Cyrl, srp_Latn"), ("engl_Latn", "eng_Latn"), ("xx", "deu_Latn")])
def test_a_language_that_is_none_or_two_is_refused_with_those_there_are(compiled: Path, given: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        hfaccel.load(compiled).generate(TEXTS[0], target_language=given)
    assert says in refused.value.hint


def test_a_model_of_one_language_takes_none() -> None:
    with pytest.raises(UsageError, match="no languages"):
        find_language("fr", {}, option="target_language")
