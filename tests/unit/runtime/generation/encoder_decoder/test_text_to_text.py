from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfaccel.artifact.generation import GenerationDefaults
from hfaccel.errors import DataError, IntegrityError, UsageError
from hfaccel.runtime.generation.text_to_text import TextToTextModel

TEXTS = ["The quick brown fox jumps", "Anna", "Grüße aus Köln - ein Käse für 5 €; naïve café while it rains", "Anna moved"]


def ids_of(model: TextToTextModel, text: str) -> np.ndarray:
    return model.tokenizer.encode([text])[0].ids


def text_of(model: TextToTextModel, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def expected(model: TextToTextModel, t5: Any, texts: list[str], tokens: int, **options: Any) -> list[str]:
    return [text_of(model, t5.expected([ids_of(model, text)], tokens, **options)[0]) for text in texts]


def test_answers_are_those_of_transformers(make_text_to_text: Any, t5: Any) -> None:
    model = make_text_to_text()
    answers = expected(model, t5, TEXTS, 30)
    assert len(set(answers)) > 1
    assert model.generate(TEXTS, max_new_tokens=30) == answers
    assert model.generate(TEXTS, max_new_tokens=30, max_batch=1) == answers
    assert [model.generate(text, max_new_tokens=30) for text in TEXTS] == answers
    assert model.generate([]) == []


def test_beams_and_rules_reach_the_search(make_text_to_text: Any, t5: Any) -> None:
    model = make_text_to_text()
    options = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "no_repeat_ngram_size": 2}
    answers = expected(model, t5, TEXTS, 20, **options)
    assert model.generate(TEXTS, max_new_tokens=20, **options) == answers
    assert model.generate(TEXTS, max_new_tokens=20, max_batch=4, **options) == answers
    assert answers != expected(model, t5, TEXTS, 20)


def test_options_not_given_are_as_the_checkpoint_advises(make_text_to_text: Any, t5: Any) -> None:
    advised = GenerationDefaults(num_beams=3, length_penalty=0.5, early_stopping=True, no_repeat_ngram_size=2, min_new_tokens=4)
    forced = {"forced_first_token_id": 17, "suppressed_token_ids": (40, 41, 42)}
    model = make_text_to_text(encoder=forced, defaults=advised)
    theirs = {
        "num_beams": 3,
        "length_penalty": 0.5,
        "early_stopping": True,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "forced_bos_token_id": 17,
        "suppress_tokens": [40, 41, 42],
    }
    assert model.generate(TEXTS, max_new_tokens=20) == expected(model, t5, TEXTS, 20, **theirs)
    assert model(TEXTS[:1]) == expected(model, t5, TEXTS[:1], 127, **theirs)  # the decoder's context holds no more
    greedy = {"forced_bos_token_id": 17, "suppress_tokens": [40, 41, 42]}
    given = model.generate(TEXTS, max_new_tokens=20, num_beams=1, no_repeat_ngram_size=0, min_new_tokens=0)
    assert given == expected(model, t5, TEXTS, 20, **greedy)
    drawn = model.generate(TEXTS[0], max_new_tokens=20, temperature=2.0, seed=1)  # which searches no beams
    assert drawn == model.generate(TEXTS[0], max_new_tokens=20, temperature=2.0, seed=1, num_beams=1)
    assert drawn != model.generate(TEXTS[0], max_new_tokens=20, temperature=2.0, seed=2)


def test_long_sources_are_cut(make_text_to_text: Any, t5: Any) -> None:
    model, whole = make_text_to_text(encoder={"source_length": 8}), make_text_to_text()
    ids = ids_of(whole, TEXTS[2])
    assert len(ids) > 8
    assert ids_of(model, TEXTS[2]).tolist() == ids[:8].tolist()
    assert model.generate(TEXTS[2], max_new_tokens=20) == text_of(whole, t5.expected([ids[:8]], 20)[0])


def test_pieces_of_a_stream_make_up_the_answer(make_text_to_text: Any) -> None:
    model = make_text_to_text()
    answer = model.generate(TEXTS[0], max_new_tokens=40, no_repeat_ngram_size=2)
    pieces = list(model.generate(TEXTS[0], max_new_tokens=40, no_repeat_ngram_size=2, stream=True))
    assert len(pieces) > 5
    assert "".join(pieces) == answer


def test_an_answer_ends_before_a_stop_string_and_with_an_end_token(make_text_to_text: Any, t5: Any) -> None:
    model = make_text_to_text()
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        answer = model.generate(TEXTS[0], max_new_tokens=40, no_repeat_ngram_size=2, **options)
        stop = answer[20:23]
        stopped = model.generate(TEXTS[0], max_new_tokens=40, no_repeat_ngram_size=2, stop=stop, **options)
        assert stopped == answer[: answer.index(stop)]
    ids = t5.expected([ids_of(model, TEXTS[0])], 40, no_repeat_ngram_size=2)[0]
    ending = make_text_to_text(end_token_ids=(ids[9],))
    answer = ending.generate(TEXTS[0], max_new_tokens=40, no_repeat_ngram_size=2)
    assert answer == text_of(model, ids[: ids.index(ids[9])])


def test_raw_outputs_are_logits_of_the_first_new_token(make_text_to_text: Any, t5: Any) -> None:
    model = make_text_to_text(encoder={"forced_first_token_id": 17})
    for text, output in zip(TEXTS, model.raw_outputs(TEXTS), strict=True):
        assert output["logits"].shape == (400,)
        assert [int(output["logits"].argmax())] == t5.expected([ids_of(model, text)], 1)[0]


def test_threads_share_a_model(make_text_to_text: Any) -> None:
    model = make_text_to_text()
    options: list[dict[str, Any]] = [{"num_beams": 1}, {"num_beams": 3}] * 4
    answers = [model.generate(TEXTS, max_new_tokens=15, **given) for given in options]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda given: model.generate(TEXTS, max_new_tokens=15, **given), options)) == answers


def test_what_cannot_be_asked(make_text_to_text: Any, tmp_path: Path) -> None:
    model = make_text_to_text()
    with pytest.raises(UsageError, match="stream: only a single text can be streamed, not a list of 2"):
        model.generate(["a", "b"], stream=True)
    with pytest.raises(UsageError, match=r"stream: of 2 beams .*num_beams=1"):
        model.generate("a", num_beams=2, stream=True)
    with pytest.raises(UsageError, match="num_beams: beams are searched, not drawn"):
        model.generate("a", num_beams=2, do_sample=True)
    with pytest.raises(UsageError, match="num_beams: must be"):
        model.generate("a", num_beams=0)
    with pytest.raises(DataError, match="text 1: a text is a str, not int"):
        model.generate(["a", 5])
    with pytest.raises(DataError, match="not int"):
        model.generate(5)
    with pytest.raises(IntegrityError, match="tokenizer file is missing"):
        TextToTextModel(model.encoder_decoder, tmp_path, model.contract)
    without_encoder = replace(model.contract, generation=replace(model.contract.generation, encoder=None))
    for contract in (without_encoder, replace(model.contract, generation=None)):
        with pytest.raises(UsageError, match="makes no text of text"):
            TextToTextModel(model.encoder_decoder, tmp_path, contract)


def test_the_run_time_loads_no_compiler() -> None:
    code = "import sys, hfaccel.runtime.generation.text_to_text; print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "onnx", "optimum", "mobius", "onnx_ir"}.isdisjoint(finished.stdout.split())
