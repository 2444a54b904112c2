"""When a tiny random Whisper answers a window again, and what it takes for silence: the arithmetic is transformers'."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import WhisperNoSpeechDetection

from hfaccel.errors import UsageError
from hfaccel.runtime.generation.rules import TokenRules
from hfaccel.runtime.speech.fallback import (
    GREEDY,
    USUAL,
    Attempt,
    FallbackSettings,
    compression_ratio,
    fallback_settings,
    judge,
)
from hfaccel.runtime.speech.model import SpeechModel

RATE = 16000
LONG_SECONDS = 3.3
SoundOf = Callable[[int, float], np.ndarray]


def ids(model: SpeechModel, sounds: list[np.ndarray], **options: Any) -> list[list[int]]:
    return model.transcribe_ids(sounds, sampling_rate_hz=RATE, **options)


def vocabulary(model: SpeechModel) -> int:
    assert model.contract.generation is not None
    return model.contract.generation.vocabulary_size


@pytest.mark.parametrize("tokens", [[5], list(range(40)), [7, 8] * 20, [300, 1, 2] * 3])
@pytest.mark.parametrize("size", [360, 51_864, 70_000])
def test_compression_ratios_are_those_of_transformers(reference: Any, tokens: list[int], size: int) -> None:
    expected = reference.model._retrieve_compression_ratio(torch.tensor(tokens), size)
    assert compression_ratio(tokens, size) == pytest.approx(expected)


@pytest.mark.parametrize("timestamps", [False, True])
def test_mean_log_probabilities_are_those_of_transformers(
    model: SpeechModel, reference: Any, sound_of: SoundOf, monkeypatch: pytest.MonkeyPatch, timestamps: bool
) -> None:
    """Of greedy answers, with the rules applied, the token that ends an answer included."""
    sounds = [sound_of(seed, 0.9) for seed in range(4)]
    expected = []
    for sound in sounds:
        made = reference.generate(
            [sound], return_dict_in_generate=True, output_scores=True, return_timestamps=timestamps, logprob_threshold=-100.0,
            temperature=(0.0,), compression_ratio_threshold=100.0, return_segments=timestamps,
        )  # fmt: skip
        result = made["segments"][0][0]["result"] if timestamps else made
        told = result["sequences"] if timestamps else result["sequences"][0]
        scores = result["scores"] if timestamps else [row[0] for row in result["scores"]]
        expected.append(float(reference.model._retrieve_avg_logprobs(list(scores), told[-len(scores) :], 0.0)))
    seen: list[Attempt] = []

    def spy(attempt: Attempt, *args: Any, **kwargs: Any) -> Any:
        seen.append(attempt)
        return judge(attempt, *args, **kwargs)

    monkeypatch.setattr("hfaccel.runtime.speech.windows.judge", spy)
    ids(model, sounds, temperatures=0, logprob_threshold=-100, timestamps=timestamps)
    assert [attempt.logprob for attempt in seen] == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) == len(sounds)


def test_silence_is_as_likely_as_in_transformers(
    model: SpeechModel, reference: Any, sound_of: SoundOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds = [sound_of(seed, 0.9) for seed in range(3)]
    found: list[np.ndarray] = []
    whole = WhisperNoSpeechDetection.__call__

    def spy(self: WhisperNoSpeechDetection, *args: Any) -> Any:
        result = whole(self, *args)
        if torch.is_tensor(self.no_speech_prob):
            found.append(self.no_speech_prob.numpy().copy())
        return result

    monkeypatch.setattr(WhisperNoSpeechDetection, "__call__", spy)
    reference.generate(
        sounds, no_speech_threshold=0.6, logprob_threshold=-1.0, temperature=(0.0,), compression_ratio_threshold=9.0,
        return_dict_in_generate=True, output_scores=True, language="en",
    )  # fmt: skip
    features = np.stack([model.features.of_window(sound) for sound in sounds])
    memory = model.encoder_decoder.encode({"input_features": features})
    made = model._windows.no_speech_probabilities(memory)
    assert made == pytest.approx(found[0], abs=1e-5)
    assert len(set(made.tolist())) == 3


def test_a_window_of_silence_yields_no_text_where_the_threshold_says_so(model: SpeechModel, sound_of: SoundOf) -> None:
    sounds = [sound_of(0, 0.9), sound_of(1, LONG_SECONDS)]
    quiet = {"temperatures": 0, "logprob_threshold": 0.0}
    dropped = model.transcribe(sounds, sampling_rate_hz=RATE, timestamps=True, no_speech_threshold=-1.0, **quiet)
    assert [(item.text, item.segments) for item in dropped] == [("", ())] * 2
    kept = model.transcribe(sounds, sampling_rate_hz=RATE, timestamps=True, no_speech_threshold=1.0, **quiet)
    assert all(item.text for item in kept)
    # An answer that is likely is no silence, however likely the model holds that.
    likely = {"temperatures": 0, "logprob_threshold": -math.inf, "no_speech_threshold": -1.0}
    assert ids(model, sounds, **likely) == ids(model, sounds, temperatures=0)


def test_only_the_silent_windows_of_a_sound_are_left_out(model: SpeechModel, sound_of: SoundOf) -> None:
    """The threshold lies between the windows of one sound: what stays is what these windows say."""
    sound = np.concatenate([sound_of(seed, 1.0) for seed in range(4)])
    features = np.stack([model.features.of_recording(sound)[:, start : start + 100] for start in range(0, 400, 100)])
    chances = model._windows.no_speech_probabilities(model.encoder_decoder.encode({"input_features": features}))
    threshold = float(np.sort(chances)[1:3].mean())
    options = {"temperatures": 0, "logprob_threshold": 0.0, "timestamps": True, "language": "en", "max_new_tokens": 3}
    # With three tokens no window has a pair of times, so that each is used up whole.
    segments = model.transcribe(sound, sampling_rate_hz=RATE, no_speech_threshold=threshold, **options).segments
    assert 0 < len(segments) < 4
    assert {int(item.start_seconds) for item in segments} <= {place for place in range(4) if chances[place] <= threshold}


def test_a_repetitive_answer_is_tried_again_until_it_is_good(model: SpeechModel, sound_of: SoundOf) -> None:
    """Random models answer with much variety; so the threshold is put where half of their greedy answers lie above."""
    sounds = [sound_of(seed, 0.9) for seed in range(8)]
    size, end = vocabulary(model), model.contract.generation.end_token_ids[0]  # type: ignore[union-attr]
    greedy = ids(model, sounds)
    room = 48 - 4  # of the context, without what an answer is asked for with: an answer that fills it has no token that ends it
    ratios = [compression_ratio([*row, end][:room], size) for row in greedy]
    threshold = float(np.median(ratios))
    made = ids(model, sounds, temperatures=(0.0, 0.6, 1.0), compression_ratio_threshold=threshold, logprob_threshold=-99, seed=1)
    for before, after, ratio in zip(greedy, made, ratios, strict=True):
        assert (after == before) == (ratio <= threshold)
    better = sum(
        compression_ratio([*row, end][:room], size) < ratio for row, ratio in zip(made, ratios, strict=True) if ratio > threshold
    )
    assert better >= 2
    assert ids(model, sounds, temperatures=(0.0, 0.6), compression_ratio_threshold=99, logprob_threshold=-99) == greedy


def test_draws_repeat_with_their_seed_and_do_not_depend_on_the_batch(model: SpeechModel, sound_of: SoundOf) -> None:
    sounds = [sound_of(seed, seconds) for seed, seconds in enumerate([0.9, LONG_SECONDS, 0.7, 2.1])]
    drawn = ids(model, sounds, temperatures=1.0, seed=3)
    assert drawn == ids(model, sounds, temperatures=1.0, seed=3)
    assert drawn == ids(model, sounds, temperatures=1.0, seed=3, max_batch=1)
    assert drawn != ids(model, sounds, temperatures=1.0, seed=4)
    assert drawn != ids(model, sounds, temperatures=0)


def test_long_sounds_are_judged_by_default_and_short_ones_are_not(model: SpeechModel, sound_of: SoundOf) -> None:
    short, long = sound_of(0, 0.9), sound_of(1, LONG_SECONDS)
    assert ids(model, [short, long]) == [ids(model, [short], temperatures=0)[0], ids(model, [short, long], **usual())[1]]
    assert ids(model, [long]) != ids(model, [long], temperatures=0)  # a random model is sure of nothing
    assert ids(model, [short]) != ids(model, [short], **usual())


def usual() -> dict[str, Any]:
    return {
        "temperatures": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        "compression_ratio_threshold": 1.35,
        "logprob_threshold": -1.0,
        "no_speech_threshold": 0.6,
    }


@pytest.mark.parametrize("timestamps", [False, True])
def test_a_stream_gives_what_was_found_good(model: SpeechModel, sound_of: SoundOf, timestamps: bool) -> None:
    sound = sound_of(0, LONG_SECONDS)
    whole = model.transcribe(sound, sampling_rate_hz=RATE, timestamps=timestamps)
    pieces = list(model.transcribe(sound, sampling_rate_hz=RATE, timestamps=timestamps, stream=True))
    assert (tuple(pieces) if timestamps else "".join(pieces).strip()) == (whole.segments if timestamps else whole.text)
    assert len(pieces) > 1


def test_beams_come_first_and_are_judged_by_their_score(
    model: SpeechModel, reference: Any, sound_of: SoundOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds = [sound_of(seed, 0.8) for seed in range(3)]
    seen: list[Attempt] = []

    def spy(attempt: Attempt, *args: Any, **kwargs: Any) -> Any:
        seen.append(attempt)
        return judge(attempt, *args, **kwargs)

    monkeypatch.setattr("hfaccel.runtime.speech.windows.judge", spy)
    made = ids(model, sounds, num_beams=3, temperatures=0, logprob_threshold=-99)
    assert made == ids(model, sounds, num_beams=3)
    expected = []
    for sound in sounds:
        given = reference.generate([sound], num_beams=3, return_dict_in_generate=True, output_scores=True)
        expected.append(float(given["sequences_scores"][0]))
    assert [attempt.logprob for attempt in seen] == pytest.approx(expected, abs=1e-4)
    drawn = ids(model, sounds, num_beams=3, temperatures=(0.0, 1.0), logprob_threshold=0.0)
    assert all(first != second for first, second in zip(drawn, made, strict=True))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None, None), None),
        (((0.0, 0.5), None, None, None), FallbackSettings((0.0, 0.5), 1.35, -1.0, 0.6)),
        ((0.0, None, None, None), GREEDY),
        ((None, None, None, 0.4), FallbackSettings(USUAL.temperatures, 1.35, -1.0, 0.4)),
        ((0, None, None, 0.4), FallbackSettings((0,), None, -1.0, 0.4)),
        ((0.3, 2.0, -2.0, None), FallbackSettings((0.3,), 2.0, -2.0, None)),
    ],
)
def test_what_is_not_given_is_as_usual(given: tuple[Any, ...], expected: FallbackSettings | None) -> None:
    assert fallback_settings(*given) == expected


def test_silence_goes_before_another_try() -> None:
    attempt = Attempt((1, 2) * 30, -3.0)
    assert judge(attempt, lambda: 0.9, USUAL, vocabulary=360) == "silence"
    assert judge(attempt, lambda: 0.1, USUAL, vocabulary=360) == "retry"
    assert judge(Attempt((1, 2) * 30, -0.5), lambda: 0.9, USUAL, vocabulary=360) == "retry"
    assert judge(Attempt(tuple(range(20)), -0.5), lambda: 0.9, USUAL, vocabulary=360) == "good"


@pytest.mark.parametrize(
    "options",
    [
        {"temperatures": -0.1},
        {"temperatures": ()},
        {"temperatures": (0.0, math.nan)},
        {"logprob_threshold": math.nan},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(model: SpeechModel, sound_of: SoundOf, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        model.transcribe(sound_of(0, 0.5), sampling_rate_hz=RATE, **options)
    assert caught.value.where == next(iter(options))
    assert caught.value.hint


def test_rules_hold_for_draws_too(model: SpeechModel, sound_of: SoundOf) -> None:
    rules: TokenRules = model._rules
    drawn = ids(model, [sound_of(seed, 0.9) for seed in range(4)], temperatures=2.0)
    assert not {token for row in drawn for token in row} & {*rules.suppressed_token_ids}
