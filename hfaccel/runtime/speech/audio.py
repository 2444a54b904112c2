"""Sound files and arrays to mono samples at the rate that a model listens to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hfaccel.errors import DataError, UsageError

_ZERO_CROSSINGS = 64
"""Of the sinc on either side of its middle: a wider kernel cuts off more steeply."""
_STOP_BAND_DECIBELS = 90.0
# Kaiser's formulas: the shape of the window for this attenuation, and how wide the slope of the filter is then. The slope ends at
# the lower of both Nyquist frequencies, of which all frequencies here are shares.
_KAISER_BETA = 0.1102 * (_STOP_BAND_DECIBELS - 8.7)
_SLOPE = (_STOP_BAND_DECIBELS - 8) / (2.285 * 2 * _ZERO_CROSSINGS * math.pi)
_CUT_OFF = 1 - _SLOPE / 2
_LEAST_RATE_HZ, _MOST_RATE_HZ = 100, 1_000_000
"""What is given in kilohertz by mistake would become hours of sound."""


def load_sound(sound: str | Path | np.ndarray, sampling_rate_hz: int, *, array_rate_hz: int | None = None) -> np.ndarray:
    """The samples of a sound, mixed to one channel.

    Args:
        sound: path of a WAV, FLAC, OGG or MP3 file; or samples [samples] or [samples, channels], floats from -1 to 1 or signed
            integers of full scale. Of an array with two axes the shorter one is that of the channels.
        sampling_rate_hz: wanted.
        array_rate_hz: of an array; files tell their own.

    Returns:
        float32 [samples], at least one.

    Raises:
        DataError: the file is missing, empty or cannot be read, or the samples are none, not finite, or no samples.
        UsageError: an array without a rate, or a rate that is no rate of sound.
    """
    if isinstance(sound, np.ndarray):
        if array_rate_hz is None:
            raise UsageError("an array does not tell its sampling rate", where="sampling_rate_hz", hint="give it in hertz")
        _check_rate(array_rate_hz)
        samples, rate, name = _array_samples(sound), array_rate_hz, "the array"
    else:
        samples, rate = _read_file(Path(sound))
        name = str(sound)
    if not samples.size:
        raise DataError("the sound has no samples", where=name, hint="leave empty recordings out")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise DataError("the sound has samples that are NaN or infinite", where=name, hint="record or convert it again")
    return resample(mono, rate, sampling_rate_hz)


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """The same sound at another rate, without what the lower of both rates cannot hold.

    Band-limited interpolation with a Kaiser-windowed sinc (J. O. Smith, "Digital Audio Resampling", 1984), evaluated exactly at
    every phase. Frequencies up to 0.9 of the lower Nyquist frequency pass, those above it are damped by 90 dB.

    Args:
        samples: float32 [samples], at least one.
        from_hz: rate of the samples.
        to_hz: wanted.

    Returns:
        float32 [ceil(samples * to_hz / from_hz)]; the very same array where the rates are equal.

    Raises:
        UsageError: a rate is no whole number of hertz that sound is recorded at.
    """
    for rate in (from_hz, to_hz):
        _check_rate(rate)
    if from_hz == to_hz:
        return samples
    common = math.gcd(from_hz, to_hz)
    up, down = to_hz // common, from_hz // common
    half = math.ceil(_ZERO_CROSSINGS * max(1.0, down / up))
    # So many outputs are a period that neighbouring rows of the window view do not overlap: BLAS multiplies such a view in place.
    periods = math.ceil(2 * half / down)
    rows, stride = up * periods, down * periods
    size = math.ceil(samples.size * up / down)
    padded = np.pad(samples.astype(np.float32, copy=False), (half - 1, half + stride))
    windows = sliding_window_view(padded, 2 * half)
    resampled = np.empty(size, dtype=np.float32)
    for row, kernel in zip(range(min(rows, size)), _kernels(up, down, half, periods), strict=False):
        first = row * down // up
        count = -(-(size - row) // rows)
        resampled[row::rows] = windows[first : first + (count - 1) * stride + 1 : stride] @ kernel
    return resampled


def _check_rate(rate: object) -> None:
    good = isinstance(rate, int | np.integer) and not isinstance(rate, bool) and _LEAST_RATE_HZ <= rate <= _MOST_RATE_HZ
    if not good:
        raise UsageError(
            f"a sampling rate is a whole number of hertz from {_LEAST_RATE_HZ} to {_MOST_RATE_HZ}, not {rate!r}",
            where="sampling_rate_hz",
            hint="give that of the recording, such as 16000",
        )


def _kernels(up: int, down: int, half: int, periods: int) -> Iterator[np.ndarray]:
    """What each output of a period multiplies the samples by from ``half - 1`` before its place to ``half`` behind it."""
    cut_off = _CUT_OFF * min(1.0, up / down)
    places = np.arange(1 - half, half + 1, dtype=np.float64)
    table = {}
    for row in range(up * periods):
        phase = row * down % up
        if phase not in table:
            distance = places - phase / up
            window = np.i0(_KAISER_BETA * np.sqrt(np.maximum(0.0, 1 - (distance / half) ** 2)))
            kernel = np.sinc(cut_off * distance) * window
            # Each phase alone keeps the level of a constant.
            table[phase] = (kernel / kernel.sum()).astype(np.float32)
        yield table[phase]


def _array_samples(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (1, 2):
        raise DataError(f"an array of sound has one or two axes, not {array.ndim}", hint="give [samples] or [samples, channels]")
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    if np.issubdtype(array.dtype, np.signedinteger):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"samples of type {array.dtype} are not understood", hint="give floats from -1 to 1, or signed integers")
    return array.astype(np.float32)


def _read_file(path: Path) -> tuple[np.ndarray, int]:
    # Only here: arrays need no library for files, and models of text no sound at all.
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise DataError(
            f"sound files cannot be read: {error}", where=str(path), hint="pip install soundfile, or give the samples as an array"
        ) from error
    if path.is_dir():
        raise DataError("this is a folder, not a sound file", where=str(path), hint="name the files in it")
    if not path.is_file():
        raise DataError("there is no such sound file", where=str(path), hint="check the path")
    if not path.stat().st_size:
        raise DataError("the sound file is empty", where=str(path), hint="record or copy it again")
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise DataError(
            f"the sound file cannot be read: {error}", where=str(path), hint="WAV, FLAC, OGG and MP3 files are read"
        ) from error
    try:
        _check_rate(rate)
    except UsageError as error:
        raise DataError(
            f"the header of the sound file is damaged: {error.what}", where=str(path), hint="convert it again"
        ) from error
    return samples, int(rate)
