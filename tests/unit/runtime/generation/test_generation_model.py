from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfaccel.artifact.generation import GenerationDefaults
from hfaccel.errors import DataError, IntegrityError, UsageError
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings

TEXT = "The quick brown fox"
CHAT = [{"role": "user", "content": "Where does Anna live?"}]
ROWS = [[1, 17, 300, 42], [1, 5, 6], [1, 9, 8, 7, 6, 5]]


def decoded(model: GenerationModel, ids: list[int]) -> str:
    text: str = model.tokenizer.decode(ids)
    return text


def test_greedy_ids_are_those_of_transformers_up_to_the_end_token(make_model: Any, llama: Any) -> None:
    free = llama.expected(ROWS[0], 40)
    ends = (free[12], free[30])
    tiny = replace(llama, settings=replace(llama.settings, end_token_ids=ends))
    model = make_model(end_token_ids=ends)
    expected = [tiny.expected(row, 64) for row in ROWS]
    assert expected[0] == free[: free.index(ends[0]) + 1] or ends[1] in expected[0]
    assert model.generate_ids(ROWS, SamplingSettings(max_new_tokens=64)) == expected
    assert [model.generate_ids([row], SamplingSettings(max_new_tokens=64))[0] for row in ROWS] == expected


def test_repetition_penalty_answers_as_transformers(make_model: Any, llama: Any) -> None:
    expected = [llama.expected(row, 40, repetition_penalty=1.5) for row in ROWS]
    assert make_model().generate_ids(ROWS, SamplingSettings(max_new_tokens=40, repetition_penalty=1.5)) == expected


def test_the_answer_is_the_new_text(make_model: Any, llama: Any) -> None:
    model = make_model()
    ids = model.encode(TEXT)
    assert ids[0] == 1
    assert 0 not in ids
    answer = model.generate(TEXT, max_new_tokens=30)
    assert answer == decoded(model, llama.expected(ids, 30))
    assert model.generate([TEXT], max_new_tokens=30) == [answer]


def test_the_end_token_is_not_in_the_text(make_model: Any, llama: Any) -> None:
    ids = llama.expected(make_model().encode(TEXT), 30)
    model = make_model(end_token_ids=(ids[10],))
    assert model.generate(TEXT, max_new_tokens=30) == decoded(model, ids[: ids.index(ids[10])])


def test_a_conversation_is_answered(make_model: Any, llama: Any) -> None:
    model = make_model()
    ids = model.encode(CHAT)
    assert ids == model.tokenizer.encode("<s><|user|>Where does Anna live?</s>\n<|assistant|>", add_special_tokens=False).ids
    assert ids.count(1) == 1
    answer = model.generate(CHAT, max_new_tokens=20)
    assert answer == decoded(model, llama.expected(ids, 20))
    assert model.generate([CHAT, TEXT], max_new_tokens=20) == [answer, model.generate(TEXT, max_new_tokens=20)]
    assert model.generate([], max_new_tokens=20) == []


def test_a_conversation_that_grows_is_not_read_again(make_model: Any) -> None:
    model, fresh = make_model(), make_model()
    talk = list(CHAT)
    for turn in range(3):
        answer = model.generate(talk, max_new_tokens=10)
        fresh.decoder.forget()
        assert fresh.generate(talk, max_new_tokens=10) == answer
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"And {turn}?"}]
    assert model.decoder.prefill([model.encode(talk)]).reused > len(model.encode(CHAT))


def test_pieces_of_a_stream_make_up_the_answer(make_model: Any) -> None:
    model = make_model()
    for prompt in (TEXT, CHAT):
        answer = model.generate(prompt, max_new_tokens=40)
        pieces = list(model.generate(prompt, max_new_tokens=40, stream=True))
        assert len(pieces) > 5
        assert all(pieces)
        assert "".join(pieces) == answer


def test_a_stream_may_be_left_and_others_run_beside_it(make_model: Any) -> None:
    model = make_model()
    answer = model.generate(TEXT, max_new_tokens=40)
    first, second = (model.generate(prompt, max_new_tokens=40, stream=True) for prompt in (TEXT, "Anna moved"))
    started = [next(first), next(second), next(first)]
    second.close()
    assert started[0] + started[2] + "".join(first) == answer
    assert model.generate("Anna moved", max_new_tokens=40).startswith(started[1])


def test_threads_share_a_model(make_model: Any) -> None:
    model = make_model()
    prompts = [TEXT, "Anna moved", CHAT, "Grüße"] * 3
    expected = [model.generate(prompt, max_new_tokens=20) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: model.generate(prompt, max_new_tokens=20), prompts)) == expected


def test_the_run_time_of_generation_loads_no_compiler() -> None:
    code = "import sys, hfaccel.runtime.generation.model; print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "onnx", "optimum", "mobius", "onnx_ir"}.isdisjoint(finished.stdout.split())


def test_an_answer_ends_before_a_stop_string(make_model: Any) -> None:
    model = make_model()
    answer = model.generate(TEXT, max_new_tokens=40)
    stop = answer[20:24]
    expected = answer[: answer.index(stop)]
    assert model.generate(TEXT, max_new_tokens=40, stop=stop) == expected
    assert "".join(model.generate(TEXT, max_new_tokens=40, stop=["never seen", stop], stream=True)) == expected
    ids = model.generate_ids([model.encode(TEXT)], SamplingSettings(max_new_tokens=40, stop=(stop,)))[0]
    assert len(ids) < 40
    assert stop in decoded(model, ids)


def test_draws_repeat_with_their_seed_whatever_the_neighbours(make_model: Any) -> None:
    model = make_model()

    def draw(rows: list[list[int]], seed: int | None, max_batch: int = 16) -> list[list[int]]:
        settings = SamplingSettings(max_new_tokens=30, do_sample=True, temperature=0.8, top_p=0.95, seed=seed)
        return model.generate_ids(rows, settings, max_batch=max_batch)

    together = draw(ROWS, 7)
    assert draw(ROWS, 7) == together
    assert draw(ROWS, 7, max_batch=1) == together
    assert draw(ROWS[:1], 7) == together[:1]
    assert draw([[1, 2, 3], ROWS[1], [1] * 9], 7)[1] == together[1]
    assert draw(ROWS, 8) != together
    assert draw(ROWS, None) != draw(ROWS, None)
    same = draw([ROWS[0]] * 3, 7)
    assert len({tuple(row) for row in same}) == 3


def test_options_not_given_are_as_the_checkpoint_advises(make_model: Any) -> None:
    plain = make_model()
    greedy = plain.generate(TEXT, max_new_tokens=20)
    drawn = plain.generate(TEXT, max_new_tokens=20, temperature=3.0, seed=1)
    assert drawn != greedy
    assert plain.generate(TEXT, max_new_tokens=20, temperature=3.0, do_sample=False) == greedy
    advised = make_model(defaults=GenerationDefaults(do_sample=True, temperature=3.0))
    assert advised.generate(TEXT, max_new_tokens=20, seed=1) == drawn
    assert advised.generate(TEXT, max_new_tokens=20, do_sample=False) == greedy
    assert make_model(defaults=GenerationDefaults(temperature=3.0)).generate(TEXT, max_new_tokens=20) == greedy
    penalized = make_model(defaults=GenerationDefaults(repetition_penalty=2.0)).generate(TEXT, max_new_tokens=20)
    assert penalized == plain.generate(TEXT, max_new_tokens=20, repetition_penalty=2.0) != greedy
    assert plain.generate(TEXT, max_new_tokens=20, top_k=1) == greedy


def test_an_answer_is_cut_where_the_context_is_full(make_model: Any, llama: Any) -> None:
    model = make_model(context_length=20)
    rows = [[1, 17, 300, 42], [1, *range(50, 65)]]
    ids = model.generate_ids(rows, SamplingSettings(max_new_tokens=500))
    assert ids == [llama.expected(rows[0], 16), llama.expected(rows[1], 4)]


@pytest.mark.parametrize("tokens", [20, 21, 400])
def test_a_prompt_that_leaves_no_room_is_refused(make_model: Any, tokens: int) -> None:
    with pytest.raises(DataError, match=rf"prompt 1: the prompt has {tokens} tokens, and the model reads 20.*shorten"):
        make_model(context_length=20).generate_ids([[1], [1] * tokens], SamplingSettings())


def test_what_cannot_be_asked(make_model: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(UsageError, match="stream: only a single prompt can be streamed"):
        model.generate([TEXT, TEXT], stream=True)
    with pytest.raises(UsageError, match="temperature: must be"):
        model.generate(TEXT, temperature=-1, stream=True)  # at once, not when the first piece is asked for
    with pytest.raises(DataError, match="not int"):
        model.generate(5)
    with pytest.raises(DataError, match="not int"):
        model.generate([5])
    with pytest.raises(DataError, match="no tokens"):
        model.generate_ids([[]], SamplingSettings())
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    without_template = GenerationModel(model.decoder, tmp_path, model.contract)
    assert without_template.generate(TEXT, max_new_tokens=5) == model.generate(TEXT, max_new_tokens=5)
    with pytest.raises(UsageError, match="no chat template"):
        without_template.generate(CHAT)


def test_a_folder_or_contract_that_cannot_be_used(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(IntegrityError, match="tokenizer file is missing"):
        GenerationModel(model.decoder, tmp_path, model.contract)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(IntegrityError, match="tokenizer file cannot be read"):
        GenerationModel(model.decoder, tmp_path, model.contract)
    with pytest.raises(UsageError, match="generates no text"):
        GenerationModel(model.decoder, tmp_path, replace(model.contract, task="fill-mask", generation=None))
