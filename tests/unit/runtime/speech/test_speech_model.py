"""A tiny random Whisper writes down what transformers does: short sounds, long ones, batches, languages, beams, streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer

from hfaccel.artifact.contract import Contract, TextSettings
from hfaccel.artifact.generation import GenerationDefaults
from hfaccel.errors import DataError, IntegrityError, UsageError
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.speech.model import SpeechModel

RATE = 16000
SoundOf = Callable[[int, float], np.ndarray]


def ids(model: SpeechModel, sounds: list[np.ndarray], **options: Any) -> list[list[int]]:
    """Of every window the likeliest tokens, as transformers does without options; ``test_speech_fallback`` has the rest."""
    return model.transcribe_ids(sounds, sampling_rate_hz=RATE, **{"temperatures": 0, **options})


@pytest.mark.parametrize("seconds", [0.01, 0.3, 0.77, 1.0])
def test_short_sounds_have_the_tokens_of_transformers(
    model: SpeechModel, reference: Any, sound_of: SoundOf, seconds: float
) -> None:
    for seed in range(2):
        sound = sound_of(seed, seconds)
        (made,) = ids(model, [sound])
        assert made == reference.ids([sound])[0]


def test_sounds_make_a_difference(model: SpeechModel, sound_of: SoundOf) -> None:
    made = ids(model, [sound_of(seed, 0.8) for seed in range(6)])
    assert len({tuple(row) for row in made}) > 3
    assert max(len(set(row)) for row in made) > 5


@pytest.mark.parametrize("options", [{"language": "fr"}, {"language": "de", "task": "translate"}, {"max_new_tokens": 5}], ids=str)
def test_options_mean_what_they_mean_in_transformers(
    model: SpeechModel, reference: Any, sound_of: SoundOf, options: dict[str, Any]
) -> None:
    sounds = [sound_of(seed, 0.9) for seed in range(3)]
    made = ids(model, sounds, **options)
    assert made == reference.ids(sounds, **options)
    assert made != ids(model, sounds)


@pytest.mark.parametrize("max_batch", [2, 8])
def test_several_sounds_are_as_each_alone(model: SpeechModel, reference: Any, sound_of: SoundOf, max_batch: int) -> None:
    sounds = [sound_of(seed, seconds) for seed, seconds in enumerate([0.8, 0.8, 0.8, 0.4, 1.0])]
    expected = [reference.ids([sound])[0] for sound in sounds]
    assert ids(model, sounds, max_batch=max_batch) == expected
    assert len({len(row) for row in expected}) > 1  # some end early


def test_the_language_is_the_one_that_transformers_hears(model: SpeechModel, reference: Any, sound_of: SoundOf) -> None:
    sounds = [sound_of(seed, 1.0) for seed in range(12)]
    heard = reference.model.detect_language(reference.features(sounds).input_features, num_segment_frames=100).tolist()
    codes = {token: code for code, token in model.contract.generation.encoder.speech.languages}  # type: ignore[union-attr]
    made = [transcript.language for transcript in model.transcribe(sounds, sampling_rate_hz=RATE, max_new_tokens=1)]
    assert made == [codes[token] for token in heard]
    assert len(set(made)) > 1


@pytest.mark.parametrize(("seed", "seconds"), [(0, 1.4), (1, 2.0), (2, 3.317), (3, 4.0)])
def test_long_sounds_have_the_tokens_of_transformers(
    model: SpeechModel, reference: Any, sound_of: SoundOf, seed: int, seconds: float
) -> None:
    sound = sound_of(seed, seconds)
    made = ids(model, [sound])
    assert made == reference.ids([sound], whole=True, return_timestamps=True)
    assert made == ids(model, [sound], timestamps=True)


def test_long_sounds_together_are_as_each_alone(model: SpeechModel, reference: Any, sound_of: SoundOf) -> None:
    sounds = [sound_of(0, 2.2), sound_of(1, 0.5), sound_of(2, 4.1), sound_of(3, 0.8)]
    expected = [ids(model, [sound])[0] for sound in sounds]
    assert ids(model, sounds) == expected
    assert expected[0] == reference.ids([sounds[0]], whole=True, return_timestamps=True)[0]


def test_segments_are_those_of_transformers(model: SpeechModel, reference: Any, sound_of: SoundOf) -> None:
    """But for one thing: in a window without a pair of times transformers forgets the first, and tells the window's start."""
    first_time = model.contract.generation.encoder.speech.no_timestamps_token_id + 1  # type: ignore[union-attr]
    compared = 0
    for seed in range(4):
        sound = sound_of(seed, 3.3)
        made = model.transcribe(sound, sampling_rate_hz=RATE, timestamps=True, temperatures=0).segments
        assert [item.start_seconds for item in made] == sorted(item.start_seconds for item in made)
        assert all(item.end_seconds > item.start_seconds and item.text for item in made)
        times = {item.end_seconds: item.start_seconds for item in made}
        generated = reference.generate([sound], whole=True, return_timestamps=True, return_segments=True)["segments"][0]
        for item in generated:
            told = [token for token in item["tokens"].tolist() if token >= first_time]
            if len(set(told)) > 1:
                start = float(item["start"])
                assert times[round(float(item["end"]), 6)] in (
                    pytest.approx(start),
                    pytest.approx(start + 0.02 * (told[0] - first_time)),
                )
                compared += 1
    assert compared >= 8


def test_beams_find_what_transformers_finds(model: SpeechModel, reference: Any, sound_of: SoundOf) -> None:
    sounds = [sound_of(seed, 0.8) for seed in range(3)]
    made = ids(model, sounds, num_beams=3)
    assert made == [reference.ids([sound], num_beams=3)[0] for sound in sounds]
    assert made != ids(model, sounds)
    long = sound_of(4, 2.4)
    assert ids(model, [long], num_beams=2) == reference.ids([long], whole=True, num_beams=2, return_timestamps=True)


def test_the_checkpoint_advises_beams(make_model: Callable[..., SpeechModel], sound_of: SoundOf) -> None:
    advised = make_model(GenerationDefaults(num_beams=3))
    sounds = [sound_of(seed, 0.8) for seed in range(3)]
    assert ids(advised, sounds) == ids(make_model(), sounds, num_beams=3)


def test_text_is_what_the_tokenizer_makes_of_the_tokens(model: SpeechModel, sound_of: SoundOf, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    first_time = model.contract.generation.encoder.speech.no_timestamps_token_id + 1  # type: ignore[union-attr]
    for seconds in (0.8, 3.3):
        sound = sound_of(2, seconds)
        transcript = model.transcribe(sound, sampling_rate_hz=RATE, temperatures=0)
        words = [token for token in ids(model, [sound])[0] if token < first_time]
        assert transcript.text == tokenizer.decode(words).strip()
        assert "<|" not in transcript.text
        assert transcript.segments == ()


@pytest.mark.parametrize("seconds", [0.8, 3.3])
def test_a_stream_gives_the_same_text_in_pieces(model: SpeechModel, sound_of: SoundOf, seconds: float) -> None:
    most = 0
    for seed in range(3):
        sound = sound_of(seed, seconds)
        pieces = list(model.transcribe(sound, sampling_rate_hz=RATE, stream=True))
        assert "".join(pieces).strip() == model.transcribe(sound, sampling_rate_hz=RATE).text
        most = max(most, len(pieces))
    assert most > 2


def test_a_stream_gives_segments_as_they_are_finished(model: SpeechModel, sound_of: SoundOf) -> None:
    sound = sound_of(0, 3.3)
    whole = model.transcribe(sound, sampling_rate_hz=RATE, timestamps=True)
    assert tuple(model.transcribe(sound, sampling_rate_hz=RATE, timestamps=True, stream=True)) == whole.segments
    assert len(whole.segments) > 2


def test_files_and_arrays_of_other_rates_are_read(model: SpeechModel, sound_of: SoundOf, tmp_path: Path) -> None:
    sound = sound_of(1, 0.9)
    path = tmp_path / "sound.wav"
    soundfile.write(str(path), sound, RATE, subtype="FLOAT")
    expected = model.transcribe(sound, sampling_rate_hz=RATE)
    assert model.transcribe(path) == expected
    assert model.transcribe([str(path), sound], sampling_rate_hz=RATE) == [expected, expected]
    slow = model.transcribe(np.repeat(sound, 2), sampling_rate_hz=2 * RATE)
    assert slow.text


def test_raw_outputs_are_the_first_logits_of_transformers(model: SpeechModel, reference: Any, sound_of: SoundOf) -> None:
    sounds = [sound_of(0, 0.5), sound_of(1, 3.0)]
    features = [reference.features(sounds[:1]).input_features, reference.features(sounds[1:], whole=True).input_features]
    start = reference.model.generation_config.decoder_start_token_id
    for made, feature in zip(model.raw_outputs(sounds, sampling_rate_hz=RATE), features, strict=True):
        ids = feature.new_full((1, 1), start).long()
        expected = reference.model(input_features=feature[:, :, :100], decoder_input_ids=ids).logits[0, -1]
        assert made["logits"] == pytest.approx(expected.detach().numpy(), abs=1e-3)


def test_a_model_of_one_language_is_asked_for_none(
    make_model: Callable[..., SpeechModel], reference: Any, sound_of: SoundOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    english = make_model(languages=(), tasks=())
    sound = sound_of(0, 0.8)
    config = reference.model.generation_config
    monkeypatch.setattr(config, "is_multilingual", False)
    monkeypatch.delattr(config, "lang_to_id")
    assert ids(english, [sound]) == reference.ids([sound], task=None)
    assert english.transcribe(sound, sampling_rate_hz=RATE).language is None
    with pytest.raises(UsageError, match="language"):
        english.transcribe(sound, sampling_rate_hz=RATE, language="en")
    with pytest.raises(UsageError, match="task"):
        english.transcribe(sound, sampling_rate_hz=RATE, task="translate")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"language": "tlh"}, "en, de, fr"),
        ({"task": "summarize"}, "translate, transcribe"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_sound_is_read(model: SpeechModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        model.transcribe("no/such/file.wav", **options)
    assert words in str(caught.value)


def test_calls_that_make_no_sense_are_refused(model: SpeechModel) -> None:
    sound = np.zeros(100, np.float32)
    with pytest.raises(UsageError, match="streamed"):
        model.transcribe([sound, sound], sampling_rate_hz=RATE, stream=True)
    with pytest.raises(DataError, match="no such"):
        model.transcribe("no/such/file.wav")
    with pytest.raises(DataError, match="path or an array"):
        model.transcribe([0.1, 0.2], sampling_rate_hz=RATE)  # type: ignore[list-item]
    assert model.transcribe([], sampling_rate_hz=RATE) == []


def test_other_models_are_refused(
    model: SpeechModel, encoder_decoder: EncoderDecoder, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = Contract("fill-mask", (), (), TextSettings(max_length=8, pad_token_id=0))
    with pytest.raises(UsageError, match="reads no sound"):
        SpeechModel(encoder_decoder, tokenizer_folder, other)
    with pytest.raises(IntegrityError, match="tokenizer"):
        SpeechModel(encoder_decoder, tmp_path, model.contract)
