from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import DataError, IntegrityError
from hfaccel.runtime.generation.decoding import Decoding
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder

START = 3


@pytest.fixture(params=["t5", "bart", "marian", "whisper"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def greedy(decoding: Decoding, tokens: int) -> list[list[int]]:
    chosen = [decoding.logits.argmax(1)]
    while len(chosen) < tokens:
        chosen.append(decoding.step(chosen[-1]).argmax(1))
    return np.stack(chosen, 1).tolist()


def opened(tiny: Any, sources: Any, room: int = 64) -> Decoding:
    model = tiny.open()
    decoding: Decoding = model.prefill(model.encode(tiny.feeds(sources)), [[START]] * len(sources), room=room)
    return decoding


def logits_of(tiny: Any, source: np.ndarray, row: list[int]) -> np.ndarray:
    feeds = {name: torch.tensor(array) for name, array in tiny.feeds([source]).items()}
    with torch.no_grad():
        result: np.ndarray = tiny.source(**feeds, decoder_input_ids=torch.tensor([row])).logits[0, -1].numpy()
    return result


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within what float32 kernels of several processors differ by."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_greedy_equals_transformers_token_for_token(tiny: Any) -> None:
    expected = [tiny.expected([source], 64)[0] for source in tiny.sources]
    assert max(len(set(row)) for row in expected) > 10  # else equality would say little
    assert [greedy(opened(tiny, [source]), 64)[0] for source in tiny.sources] == expected


def test_another_engine_reads_sources_for_the_same_decoder(tiny: Any) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    ours, theirs = tiny.open(), tiny.open("openvino")
    feeds = tiny.feeds(tiny.sources[:3])
    memory = theirs.encode(feeds)
    later = theirs.encode(tiny.feeds(tiny.sources[1:2]))
    wanted = ours.encode(feeds).arrays()
    assert memory.arrays().keys() == wanted.keys()
    real = feeds.get("attention_mask", np.ones((3, 1)))[:, None, :, None]
    for name, array in wanted.items():
        mask = real if array.ndim == 4 else 1
        assert_close(memory.arrays()[name] * mask, array * mask)
    expected = greedy(ours.prefill(ours.encode(feeds), [[START]] * 3, room=24), 24)
    assert greedy(theirs.prefill(memory, [[START]] * 3, room=24), 24) == expected
    assert greedy(theirs.prefill(later, [[START]], room=24), 24) == expected[1:2]
    with pytest.raises(DataError, match="nothing to encode"):
        theirs.encode({name: array[:0] for name, array in feeds.items()})


def test_logits_equal_those_of_torch(tiny: Any) -> None:
    decoding = opened(tiny, tiny.sources[:1])
    assert_close(decoding.logits[0], logits_of(tiny, tiny.sources[0], [START]))
    for token in (77, 5):
        decoding.step(np.array([token]))
    assert_close(decoding.logits[0], logits_of(tiny, tiny.sources[0], [START, 77, 5]))


def test_rows_of_a_batch_get_what_they_get_alone(tiny: Any) -> None:
    expected = [tiny.expected([source], 24)[0] for source in tiny.sources]
    assert len({tuple(row) for row in expected}) > 1  # else the sources would not matter
    assert greedy(opened(tiny, tiny.sources), 24) == expected


def test_rows_may_begin_with_more_or_fewer_tokens(tiny: Any) -> None:
    rows = [[START, 50, 60, 70], [START], [START, 9]]
    model = tiny.open()
    decoding = model.prefill(model.encode(tiny.feeds(tiny.sources[:3])), rows)
    for place, row in enumerate(rows):
        assert_close(decoding.logits[place], logits_of(tiny, tiny.sources[place], row))
    decoding.step(np.array([7, 8, 9]))
    for place, row in enumerate(rows):
        assert_close(decoding.logits[place], logits_of(tiny, tiny.sources[place], [*row, 7 + place]))


def test_rows_are_dropped_with_their_memory(tiny: Any) -> None:
    decoding = opened(tiny, tiny.sources[:4])
    decoding.keep_rows([1, 3])
    assert greedy(decoding, 16) == [tiny.expected([tiny.sources[row]], 16)[0] for row in (1, 3)]


def test_rows_trade_places_are_repeated_and_dropped(tiny: Any) -> None:
    decoding = opened(tiny, tiny.sources[:3], room=0)
    rows = [(0, [START]), (1, [START]), (2, [START])]
    steps = [[2, 0, 0, 1, 2], [4, 1, 2, 0, 3], [0, 0, 3, 3, 3], [2, 0], [1, 0], [0, 0, 1, 1, 0, 1]]
    for step, order in enumerate(steps):
        decoding.reorder(order)
        rows = [rows[place] for place in order]
        tokens = [50 + 10 * step + place for place in range(len(order))]
        decoding.step(np.array(tokens))
        rows = [(source, [*row, token]) for (source, row), token in zip(rows, tokens, strict=True)]
        assert decoding.tokens == [row for _, row in rows]
        for place, (source, row) in enumerate(rows):
            assert_close(decoding.logits[place], logits_of(tiny, tiny.sources[source], row))


def test_the_cache_grows_where_no_room_was_asked_for(tiny: Any) -> None:
    sources = tiny.sources[:2]
    assert greedy(opened(tiny, sources, room=0), 80) == [tiny.expected([source], 80)[0] for source in sources]


def test_memory_is_only_copied_when_the_sources_of_rows_change(bart: Any) -> None:
    model = bart.open()
    memory = model.encode(bart.feeds(bart.sources[:2]))
    doubled = memory.select([0, 0, 1, 1])
    assert doubled.batch == 4
    assert doubled.select([1, 0, 3, 3]) is doubled
    assert doubled.select([0, 2, 2, 3]) is not doubled
    for name, array in doubled.select([3, 0]).arrays().items():
        np.testing.assert_array_equal(array, memory.arrays()[name][[1, 0]])
    rows = [[START]] * 2
    once, again = model.prefill(memory, rows), model.prefill(memory, rows)  # a memory can be read again
    once.keep_rows([1])
    once.step(np.array([7]))
    assert greedy(again, 10) == [bart.expected([source], 10)[0] for source in bart.sources[:2]]


def test_what_cannot_be_read(t5: Any) -> None:
    model = replace(t5, settings=replace(t5.settings, context_length=4)).open()
    memory = model.encode(t5.feeds(t5.sources[:2]))
    with pytest.raises(DataError, match="1 rows of tokens for 2 sources"):
        model.prefill(memory, [[START]])
    with pytest.raises(DataError, match="prompt 1: the prompt has no tokens"):
        model.prefill(memory, [[START], []])
    with pytest.raises(DataError, match=r"prompt 0: .*5 tokens.*reads 4"):
        model.prefill(memory, [[START] * 5, [START]])
    with pytest.raises(IntegrityError, match="attention_mask"):
        model.encode({"input_ids": t5.feeds(t5.sources[:2])["input_ids"]})
    with pytest.raises(DataError, match="nothing to encode"):
        model.encode({"input_ids": np.zeros((0, 3), np.int64), "attention_mask": np.zeros((0, 3), np.int64)})


def test_graphs_that_are_no_pair_are_refused(t5: Any, whisper: Any, tmp_path: Path) -> None:
    def open_pair(encoder: Path, decoder: Path, layers: int = 2) -> None:
        EncoderDecoder.open(encoder, decoder, SessionSettings(), replace(t5.settings, layers=layers))

    encoder, decoder = t5.folder / "encoder.onnx", t5.folder / "decoder.onnx"
    with pytest.raises(IntegrityError, match=r"no encoder for a decoder of 3 layers: it lacks cross\.2\.key"):
        open_pair(encoder, decoder, layers=3)
    with pytest.raises(IntegrityError, match=r"no encoder for a decoder of 1 layers: it gives cross\.1\.key"):
        open_pair(encoder, decoder, layers=1)
    with pytest.raises(IntegrityError, match=r"no encoder .* it lacks cross\.0\.key"):
        open_pair(decoder, encoder)
    with pytest.raises(IntegrityError, match=r"no decoder of 2 layers beside an encoder: it lacks encoder_attention_mask"):
        open_pair(encoder, whisper.folder / "decoder.onnx")
    with pytest.raises(IntegrityError, match=r"it reads encoder_attention_mask, which the run time does not make"):
        open_pair(whisper.folder / "encoder.onnx", decoder)
    with pytest.raises(IntegrityError, match="missing"):
        open_pair(tmp_path / "encoder.onnx", decoder)
