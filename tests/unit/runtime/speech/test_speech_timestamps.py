"""Which times may come next is as transformers has it; tokens are parted into segments, and windows follow each other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from hfaccel.artifact.generation import SpeechSettings
from hfaccel.runtime.speech.timestamps import TokenSegment, WindowSegments, allow_timestamps

TEXT, END, START, NO_TIMES, FIRST_TIME, VOCABULARY = 30, 30, 31, 32, 33, 133
SETTINGS = SpeechSettings(
    sampling_rate_hz=16000,
    mel_bins=80,
    fft_samples=400,
    hop_samples=160,
    window_seconds=2,
    end_of_text_token_id=END,
    start_of_transcript_token_id=START,
    no_timestamps_token_id=NO_TIMES,
    most_initial_timestamp=20,
)
ANSWERS = [
    [],
    [FIRST_TIME],
    [FIRST_TIME + 7],
    [FIRST_TIME + 7, 4],
    [FIRST_TIME, 4, 5, FIRST_TIME + 9],
    [FIRST_TIME, 4, 5, FIRST_TIME + 9, FIRST_TIME + 9],
    [FIRST_TIME, 4, 5, FIRST_TIME + 9, FIRST_TIME + 12, 6],
    [FIRST_TIME, 4, FIRST_TIME + 99],
    [4, 5],
    [4, FIRST_TIME + 3],
]


def expected(logits: np.ndarray, answers: list[list[int]], most_initial: int | None) -> np.ndarray:
    config = SimpleNamespace(
        no_timestamps_token_id=NO_TIMES, eos_token_id=END, bos_token_id=END, max_initial_timestamp_index=most_initial
    )
    processor = WhisperTimeStampLogitsProcessor(config, begin_index=1)
    made: np.ndarray = processor(torch.tensor([[START, *row] for row in answers]), torch.from_numpy(logits)).numpy()
    return made


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
@pytest.mark.parametrize("most_initial", [20, 0, None])
@pytest.mark.parametrize("lift", [-4.0, -2.0, 0.0, 3.0])
def test_the_same_tokens_are_left_as_in_transformers(answer: list[int], most_initial: int | None, lift: float) -> None:
    logits = np.random.default_rng(len(answer)).normal(0, 2, (40, VOCABULARY)).astype(np.float32)
    logits[:, FIRST_TIME:] += lift
    logits[:20, :5] = -np.inf  # suppressed ones
    before = logits.copy()
    made = allow_timestamps(logits, [answer] * 40, replace(SETTINGS, most_initial_timestamp=most_initial))
    assert np.array_equal(made, expected(logits, [answer] * 40, most_initial))
    assert np.array_equal(logits, before)


def test_both_outcomes_of_the_weighing_are_among_the_cases() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (200, VOCABULARY)).astype(np.float32)
    logits[:, FIRST_TIME:] -= 3
    made = allow_timestamps(logits, [[FIRST_TIME, 4]] * 200, SETTINGS)
    forced = np.isneginf(made[:, :FIRST_TIME]).all(axis=1)
    assert 20 < forced.sum() < 180


def test_rows_have_their_own_histories() -> None:
    answers = [[FIRST_TIME, 4, FIRST_TIME + 9], [FIRST_TIME, 4, 5], [FIRST_TIME + 2, 4, 5]]
    logits = np.random.default_rng(2).normal(0, 2, (3, VOCABULARY)).astype(np.float32)
    assert np.array_equal(allow_timestamps(logits, answers, SETTINGS), expected(logits, answers, 20))


def part(ids: list[int], start_seconds: float = 0.0, frames: int = 200) -> tuple[list[TokenSegment], list[int], int]:
    window = WindowSegments(SETTINGS, start_seconds, frames)
    segments = [segment for token in ids if (segment := window.push(token)) is not None]
    last, kept, used = window.finish()
    return [*segments, *([last] if last is not None else [])], kept, used


def time(seconds: float) -> int:
    return FIRST_TIME + round(seconds / 0.02)


def test_what_the_end_of_the_window_cut_off_is_left_to_the_next() -> None:
    ids = [time(0), 1, 2, time(0.5), time(0.6), 3, time(1.2), time(1.2), 4, 5]
    segments, kept, used = part(ids, start_seconds=10)
    assert [(item.start_seconds, item.end_seconds, item.token_ids) for item in segments] == [
        (10.0, 10.5, (1, 2)),
        (10.6, 11.2, (3,)),
    ]
    assert kept == ids[:8]
    assert used == 120


def test_after_a_single_time_at_the_end_nobody_speaks() -> None:
    ids = [time(0), 1, time(0.5), time(0.5), 2, time(0.9)]
    segments, kept, used = part(ids)
    assert [(item.start_seconds, item.end_seconds) for item in segments] == [(0.0, 0.5), (0.5, pytest.approx(0.9))]
    assert kept == ids
    assert used == 200


def test_a_window_without_a_pair_is_used_up() -> None:
    for ids, times in [
        ([time(0.2), 1, 2], (0.2, 1.5)),
        ([time(0.2), 1, 2, time(0.8)], (0.2, 0.8)),
        ([1, 2], (0.0, 1.5)),
        ([time(1.6), 1, 2], (0.0, 1.5)),
    ]:
        segments, kept, used = part(ids, frames=150)
        assert [(item.start_seconds, item.end_seconds) for item in segments] == [pytest.approx(times)]
        assert kept == ids
        assert used == 150


def test_an_answer_without_tokens_has_no_segment() -> None:
    assert part([], frames=90) == ([], [], 90)


def test_the_next_window_always_starts_later() -> None:
    # The rules on logits do not let this happen; a caller without them must not hang.
    assert part([time(0), time(0), 1])[2] == 1
    assert part([time(0), 1, time(1.9), time(1.9), 2], frames=50)[2] == 50
