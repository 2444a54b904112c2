from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import DataError, IntegrityError
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.decoding import Decoding

PROMPT = [1, 17, 300, 42, 250, 42, 9]


@pytest.fixture(params=["llama", "llama_last", "gpt2"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def greedy(decoder: Decoder, rows: list[list[int]], tokens: int, room: int | None = None) -> list[list[int]]:
    decoding = decoder.prefill(rows, room=tokens if room is None else room)
    chosen = [decoding.logits.argmax(1)]
    while len(chosen) < tokens:
        chosen.append(decoding.step(chosen[-1]).argmax(1))
    decoder.keep(decoding)
    return np.stack(chosen, 1).tolist()


def logits_of(tiny: Any, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = tiny.source(torch.tensor([row])).logits[0, -1].numpy()
    return result


def test_greedy_equals_transformers_token_for_token(tiny: Any) -> None:
    expected = tiny.expected(PROMPT, 64)
    assert len(set(expected)) > 10  # else equality would say little
    assert greedy(tiny.open(), [PROMPT], 64) == [expected]


def test_logits_equal_those_of_torch(tiny: Any) -> None:
    decoding = tiny.open().prefill([PROMPT], room=2)
    first = decoding.logits
    np.testing.assert_allclose(first, logits_of(tiny, PROMPT)[None], atol=2e-4)
    kept = first.copy()
    decoding.step(np.array([77]))
    np.testing.assert_allclose(decoding.logits, logits_of(tiny, [*PROMPT, 77])[None], atol=2e-4)
    np.testing.assert_array_equal(first, kept)


def test_rows_of_a_ragged_batch_get_what_they_get_alone(tiny: Any) -> None:
    rows = [PROMPT, [1, 5], [1, *range(50, 90)], [1]]
    together = greedy(tiny.open(), rows, 24)
    assert together == [tiny.expected(row, 24) for row in rows]


@pytest.mark.parametrize(
    "rows",
    [[[1, *range(50, 90)]], [[1, *range(50, 90)], PROMPT], [[1, *range(50, 90)], [1, *range(91, 130)]]],
    ids=["one", "ragged", "even"],
)
def test_long_prompts_are_read_in_pieces_and_answered_as_at_once(
    tiny: Any, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.open().prefill(rows, room=2)
    for limit in ("PIECE_TOKENS", "GROUP_TOKENS"):
        monkeypatch.setattr(f"hfaccel.runtime.generation.decoding.{limit}", 7)
    pieces = tiny.open().prefill(rows, room=2)
    assert pieces.tokens == whole.tokens == rows
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=2e-4)
    chosen = np.arange(5, 5 + len(rows))
    np.testing.assert_allclose(pieces.step(chosen), whole.step(chosen), atol=2e-4)
    assert greedy(tiny.open(), rows, 24) == [tiny.expected(row, 24) for row in rows]


def test_prompts_of_one_length_are_read_together(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    before = Decoding._run

    def counted(self: Decoding, session: Any, binding: Any, ids: np.ndarray, *rest: Any) -> None:
        calls.append(ids.shape)
        before(self, session, binding, ids, *rest)

    monkeypatch.setattr(Decoding, "_run", counted)
    tiny.open().prefill([PROMPT, PROMPT, PROMPT[:-1]])
    assert calls == [(3, len(PROMPT))]
    tiny.open().prefill([PROMPT, [1, *range(50, 90)]])
    assert calls[1:] == [(1, len(PROMPT)), (1, 41)]
    monkeypatch.setattr("hfaccel.runtime.generation.decoding.GROUP_TOKENS", 2 * len(PROMPT))
    found = tiny.open().prefill([PROMPT] * 5).logits
    assert calls[3:] == [(2, len(PROMPT)), (2, len(PROMPT)), (1, len(PROMPT))]
    np.testing.assert_allclose(found, np.repeat(tiny.open().prefill([PROMPT]).logits, 5, axis=0), atol=2e-4)


def test_rows_can_be_dropped_on_the_way(tiny: Any) -> None:
    rows = [[1, *range(50, 90)], PROMPT, [1, 5], [1, 8, 9]]
    decoding = tiny.open().prefill(rows, room=30)
    left = list(range(len(rows)))
    answers: list[list[int]] = [[] for _ in rows]
    for step in range(30):
        chosen = decoding.logits.argmax(1)
        for row, token in zip(left, chosen.tolist(), strict=True):
            answers[row].append(token)
        for dropped in {5: [0], 11: [2, 3]}.get(step, []):
            place = left.index(dropped)
            left.remove(dropped)
            keep = [index for index in range(len(left) + 1) if index != place]
            decoding.keep_rows(keep)
            chosen = chosen[keep]
        decoding.step(chosen)
    assert [len(answer) for answer in answers] == [6, 30, 12, 12]
    assert answers == [tiny.expected(row, len(answer)) for row, answer in zip(rows, answers, strict=True)]


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT, [1, 5]]], ids=["one", "two"])
def test_the_cache_grows_where_no_room_was_asked_for(tiny: Any, rows: list[list[int]]) -> None:
    assert greedy(tiny.open(), rows, 70, room=0) == [tiny.expected(row, 70) for row in rows]


def test_a_prompt_that_begins_like_the_last_one_is_not_read_again(tiny: Any) -> None:
    decoder = tiny.open()
    answer = greedy(decoder, [PROMPT], 20)[0]
    grown = [*PROMPT, *answer, 7, 8, 9]
    decoding = decoder.prefill([grown], room=20)
    assert decoding.reused == len(PROMPT) + 19  # the last token of an answer is never read
    assert decoding.tokens == [grown]
    np.testing.assert_allclose(decoding.logits, logits_of(tiny, grown)[None], atol=2e-4)
    assert decoder.prefill([grown]).reused == 0  # the other has it


@pytest.mark.parametrize("change", ["grown", "shorter", "same", "forked", "other", "much-longer"])
def test_reuse_changes_no_answer(tiny: Any, change: str) -> None:
    decoder = tiny.open()
    answer = greedy(decoder, [PROMPT], 20)[0]
    row = {
        "grown": [*PROMPT, *answer, 7, 8, 9],
        "shorter": PROMPT[:3],
        "same": PROMPT,
        "forked": [*PROMPT[:4], 99, 98],
        "other": [5, 6, 7],
        "much-longer": [*PROMPT, *answer, *range(60, 140)],
    }[change]
    assert greedy(decoder, [row], 30) == [tiny.expected(row, 30)]
    assert greedy(decoder, [PROMPT], 20) == [answer]


def test_a_filled_cache_can_be_stepped_again_and_again(tiny: Any) -> None:
    decoder = tiny.open()
    cache = decoder.prefill([PROMPT], room=5).cache
    expected = logits_of(tiny, [*PROMPT, 77])[None]
    for _ in range(2):
        decoding = Decoding(decoder, cache, PROMPT)
        np.testing.assert_allclose(decoding.step(np.array([77])), expected, atol=2e-4)
        decoding.step(np.array([5]))


def test_forgetting_frees_what_was_kept(tiny: Any) -> None:
    decoder = tiny.open()
    answer = greedy(decoder, [PROMPT], 5)
    decoder.forget()
    assert decoder.prefill([PROMPT]).reused == 0
    assert greedy(decoder, [PROMPT], 5) == answer


def test_a_batch_is_not_kept(tiny: Any) -> None:
    decoder = tiny.open()
    greedy(decoder, [PROMPT, [1, 5]], 5)
    assert greedy(decoder, [[1, 5, 6]], 5) == [tiny.expected([1, 5, 6], 5)]


def test_prompts_that_cannot_be_read(llama: Any) -> None:
    decoder = replace(llama, settings=replace(llama.settings, context_length=8)).open()
    with pytest.raises(DataError, match="no tokens"):
        decoder.prefill([[1], []])
    with pytest.raises(DataError, match="no prompt"):
        decoder.prefill([])
    with pytest.raises(DataError, match=r"prompt 1: .*9 tokens.*reads 8"):
        decoder.prefill([[1], [1] * 9])
    decoding = decoder.prefill([[1] * 7])
    decoding.step(np.array([5]))
    with pytest.raises(DataError, match="reads 8 tokens"):
        decoding.step(np.array([5]))


def test_a_graph_without_the_cache_is_refused(llama: Any, tmp_path: Path) -> None:
    settings = replace(llama.settings, layers=3)
    with pytest.raises(IntegrityError, match=r"cache of 3 layers: it lacks past_key_values\.2\.key"):
        Decoder(llama.graph, SessionSettings(), settings)
    with pytest.raises(IntegrityError, match=r"it reads past_key_values\.1\.key"):
        Decoder(llama.graph, SessionSettings(), replace(llama.settings, layers=1))
    with pytest.raises(IntegrityError, match="missing"):
        Decoder(tmp_path / "model.onnx", SessionSettings(), settings)
