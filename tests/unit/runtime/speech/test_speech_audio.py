"""Sound files and arrays become mono samples at the wanted rate, and nothing is heard that was not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from hfaccel.errors import DataError, UsageError
from hfaccel.runtime.speech.audio import load_sound, resample

RATES = [(44100, 16000), (48000, 16000), (22050, 16000), (8000, 16000), (11025, 16000), (16000, 8000), (44101, 16000)]
rates = pytest.mark.parametrize(("from_hz", "to_hz"), RATES)


def tone(pitch_hz: float, rate_hz: int, seconds: float = 0.5) -> np.ndarray:
    samples: np.ndarray = np.sin(2 * np.pi * pitch_hz * np.arange(int(seconds * rate_hz)) / rate_hz + 0.3).astype(np.float32)
    return samples


def middle(samples: np.ndarray) -> np.ndarray:
    """Without the ends, where the sound sets in."""
    return samples[samples.size // 5 : -samples.size // 5]


@rates
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_tones_below_nyquist_stay_what_they_are(from_hz: int, to_hz: int, share: float) -> None:
    pitch = share * min(from_hz, to_hz) / 2
    made = resample(tone(pitch, from_hz), from_hz, to_hz)
    assert made.dtype == np.float32
    assert made.size == -(-int(0.5 * from_hz) * to_hz // from_hz)
    expected = np.sin(2 * np.pi * pitch * np.arange(made.size) / to_hz + 0.3)
    assert np.abs(middle(made) - middle(expected)).max() < 1e-4


@pytest.mark.parametrize(("from_hz", "to_hz"), [pair for pair in RATES if pair[0] > pair[1]])
@pytest.mark.parametrize("share", [1.001, 1.3])
def test_tones_above_nyquist_do_not_come_back_as_others(from_hz: int, to_hz: int, share: float) -> None:
    pitch = share * to_hz / 2
    assert np.abs(middle(resample(tone(pitch, from_hz), from_hz, to_hz))).max() < 1e-4


def test_a_constant_stays_at_its_level() -> None:
    assert middle(resample(np.full(9000, 0.25, np.float32), 44100, 16000)) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("samples", [1, 2, 3, 100])
def test_short_sounds_have_their_length(samples: int) -> None:
    assert resample(np.ones(samples, np.float32), 44100, 16000).size == -(-samples * 160 // 441)
    assert resample(np.ones(samples, np.float32), 8000, 16000).size == 2 * samples


def test_equal_rates_change_nothing() -> None:
    samples = tone(440, 16000)
    assert np.array_equal(resample(samples, 16000, 16000), samples)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_files_are_read_mixed_and_resampled(tmp_path: Path, suffix: str) -> None:
    left, right = tone(440, 44100, 1), tone(1000, 44100, 1)
    path = tmp_path / f"sound{suffix}"
    soundfile.write(str(path), 0.4 * np.stack([left, right], axis=1), 44100)
    samples = load_sound(path, 16000)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(samples.size - 16000) < 1200  # MP3 pads
    spectrum = np.abs(np.fft.rfft(middle(samples)[:8000]))
    assert sorted(np.argsort(spectrum)[-2:] * 2) == [440, 1000]
    assert np.array_equal(load_sound(str(path), 16000), samples)


def test_arrays_of_any_layout_are_the_same_sound() -> None:
    floats = (0.5 * tone(440, 16000)).astype(np.float32)
    integers = np.round(floats * 32768).astype(np.int16)
    given = [
        floats.astype(np.float64),
        integers,
        (integers.astype(np.int32) << 16),
        np.stack([floats, floats], axis=1),
        np.stack([floats, floats]),
    ]
    for array in given:
        assert load_sound(array, 16000, array_rate_hz=16000) == pytest.approx(floats, abs=2e-5)


def test_an_array_needs_its_rate() -> None:
    with pytest.raises(UsageError, match="sampling rate"):
        load_sound(np.zeros(100, np.float32), 16000)


@pytest.mark.parametrize("rate", [0, -8000, 44100.5, True])
def test_a_rate_is_a_whole_number(rate: object) -> None:
    with pytest.raises(UsageError, match="whole number"):
        load_sound(np.zeros(100, np.float32), 16000, array_rate_hz=rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.array([0.0, np.nan, 0.0]), "NaN"),
        (np.array([0.0, np.inf, 0.0]), "NaN"),
        (np.zeros((2, 3, 4)), "axes"),
        (np.zeros(10, np.complex64), "complex64"),
        (np.zeros(10, np.uint8), "uint8"),
    ],
)
def test_arrays_that_are_no_sound_are_refused(array: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_sound(array, 16000, array_rate_hz=16000)


def test_files_that_are_no_sound_are_refused_by_name(tmp_path: Path) -> None:
    empty, damaged, silent = tmp_path / "empty.wav", tmp_path / "damaged.wav", tmp_path / "silent.wav"
    empty.write_bytes(b"")
    damaged.write_bytes(b"RIFF and no more of it")
    soundfile.write(str(silent), np.zeros((0, 1)), 16000)
    for path, words in [
        (tmp_path / "missing.wav", "no such"),
        (empty, "is empty"),
        (damaged, "cannot be read"),
        (silent, "no samples"),
        (tmp_path, "a folder, not a sound file"),
    ]:
        with pytest.raises(DataError, match=words) as caught:
            load_sound(path, 16000)
        assert str(path) in str(caught.value)
