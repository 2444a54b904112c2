"""Log-mel features are those of transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from hfaccel.artifact.generation import SpeechSettings
from hfaccel.runtime.speech.features import LogMelFeatures, mel_filters

RATE, SECONDS = 16000, 30
SETTINGS = SpeechSettings(
    sampling_rate_hz=RATE,
    mel_bins=80,
    fft_samples=400,
    hop_samples=160,
    window_seconds=SECONDS,
    end_of_text_token_id=1,
    start_of_transcript_token_id=2,
    no_timestamps_token_id=3,
)
TIMES = np.arange(SECONDS * RATE) / RATE
NOISE = np.random.default_rng(0).normal(0, 0.1, SECONDS * RATE)
SOUNDS = {
    "noise": NOISE,
    "tone": 0.5 * np.sin(2 * np.pi * 1000 * TIMES),
    "tone over faint noise": 0.5 * np.sin(2 * np.pi * 440 * TIMES) + 1e-3 * NOISE,
    "rising": np.sin(2 * np.pi * 100 * TIMES**2),
    "silence": np.zeros(SECONDS * RATE),
    "short noise": NOISE[:12345],
    "one sample": np.ones(1),
    "almost a window": NOISE[:-77],
    "more than a window": np.concatenate([NOISE, NOISE]),
}

mel_bins = pytest.mark.parametrize("bins", [80, 128])


@mel_bins
@pytest.mark.parametrize("name", SOUNDS)
def test_a_window_has_the_features_of_transformers(bins: int, name: str) -> None:
    sound = SOUNDS[name].astype(np.float32)
    made = LogMelFeatures(replace(SETTINGS, mel_bins=bins)).of_window(sound)
    expected = WhisperFeatureExtractor(feature_size=bins)(sound, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    assert made.dtype == np.float32
    assert made.shape == expected.shape == (bins, 3000)
    assert np.abs(made - expected).max() < 1e-4


@mel_bins
@pytest.mark.parametrize("samples", [480001, 480160, 1234567])
def test_a_long_recording_has_the_features_of_transformers(bins: int, samples: int) -> None:
    sound = np.resize(NOISE, samples).astype(np.float32) * np.linspace(0.001, 1, samples, dtype=np.float32)
    made = LogMelFeatures(replace(SETTINGS, mel_bins=bins)).of_recording(sound)
    extractor = WhisperFeatureExtractor(feature_size=bins)
    options = {"truncation": False, "padding": "longest"}
    expected = extractor(sound, sampling_rate=RATE, return_tensors="np", **options)["input_features"][0]
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() < 1e-4


@mel_bins
def test_filters_are_slaneys(bins: int) -> None:
    expected = mel_filter_bank(201, bins, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    assert np.abs(mel_filters(bins, 400, RATE) - expected).max() < 1e-12


def test_other_windows_hops_and_rates_hold_too() -> None:
    settings = replace(SETTINGS, window_seconds=2, hop_samples=200, fft_samples=512, mel_bins=40)
    sound = NOISE[:20000].astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=2, hop_length=200, n_fft=512)
    expected = extractor(sound, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    assert np.abs(LogMelFeatures(settings).of_window(sound) - expected).max() < 1e-4
