"""Log-mel features as Whisper was trained on them."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hfaccel.artifact.generation import SpeechSettings

_BLOCK_FRAMES = 512
"""Frames transformed at once: their spectra stay in the cache of a core."""
_PRODUCT_FRAMES = 8
"""So few that the library of matrix products starts no threads: they wait actively for a while, and cost the encoder that runs next
a quarter of its speed."""
_FLOOR = 1e-10
_SILENCE = -10.0
"""log10 of the floor."""
_RANGE = 8.0
"""What is this much below the loudest value, in powers of ten, is as good as silent."""


class LogMelFeatures:
    """Makes features of sound; the same numbers as ``transformers.WhisperFeatureExtractor``. May be shared by threads.

    Args:
        settings: of the model.

    Attributes:
        window_frames: frames that the encoder reads at once.
        window_samples: samples of sound that these are made of.
    """

    def __init__(self, settings: SpeechSettings) -> None:
        self.window_samples = settings.window_seconds * settings.sampling_rate_hz
        self.window_frames = self.window_samples // settings.hop_samples
        self._hop = settings.hop_samples
        self._fft = settings.fft_samples
        # Periodic, so not np.hanning: the first value of the next window is where this one ends.
        self._hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self._fft) / self._fft)
        self._filters = mel_filters(settings.mel_bins, self._fft, settings.sampling_rate_hz).astype(np.float32)

    def of_window(self, samples: np.ndarray) -> np.ndarray:
        """Features of a sound that fits into a window; silence follows it. What is longer is cut off.

        Args:
            samples: float32 [samples], mono, at the rate of the settings.

        Returns:
            float32 [mel_bins, window_frames].
        """
        samples = samples[: self.window_samples]
        # Frames that hear nothing need no transform.
        heard = min(self.window_frames, -(-(samples.size + self._fft // 2) // self._hop))
        spectrum = np.full((self._filters.shape[1], self.window_frames), _SILENCE, dtype=np.float32)
        self._log_mel(np.pad(samples, (0, self.window_samples - samples.size)), spectrum[:, :heard])
        return _scaled(spectrum)

    def of_recording(self, samples: np.ndarray) -> np.ndarray:
        """Features of a whole sound that is longer than a window, of which windows are cut later.

        Loudness counts in relation to the loudest place of all of it.

        Args:
            samples: float32 [samples], mono, at the rate of the settings.

        Returns:
            float32 [mel_bins, samples / hop_samples rounded down].
        """
        spectrum = np.empty((self._filters.shape[1], samples.size // self._hop), dtype=np.float32)
        self._log_mel(samples, spectrum)
        return _scaled(spectrum)

    def _log_mel(self, samples: np.ndarray, spectrum: np.ndarray) -> None:
        """Fill ``spectrum`` [mel_bins, frames]; the middle of the first frame is the first sample."""
        padded = np.pad(samples, self._fft // 2, mode="reflect")
        windows = sliding_window_view(padded, self._fft)[:: self._hop]
        for first in range(0, spectrum.shape[1], _BLOCK_FRAMES):
            block = windows[first : min(first + _BLOCK_FRAMES, spectrum.shape[1])]
            # In double precision: next to a loud tone the rounding of single precision would be heard in quiet bands.
            transformed = np.fft.rfft(block * self._hann, axis=1)
            power = (transformed.real**2 + transformed.imag**2).astype(np.float32)
            mel = np.empty((len(block), self._filters.shape[1]), dtype=np.float32)
            for some in range(0, len(block), _PRODUCT_FRAMES):
                np.matmul(power[some : some + _PRODUCT_FRAMES], self._filters, out=mel[some : some + _PRODUCT_FRAMES])
            spectrum[:, first : first + len(block)] = np.log10(np.maximum(mel, np.float32(_FLOOR))).T


def mel_filters(bins: int, fft_samples: int, sampling_rate_hz: int) -> np.ndarray:
    """Triangles on the mel scale of Slaney's Auditory Toolbox, each of the same area.

    The scale is linear up to 1000 Hz (15 mel) and logarithmic above, 27 steps for a factor of 6.4.

    Args:
        bins: triangles, from 0 Hz to half the sampling rate.
        fft_samples: of the Fourier transform.
        sampling_rate_hz: of the sound.

    Returns:
        float64 [fft_samples / 2 + 1, bins].
    """
    step = np.log(6.4) / 27
    nyquist = sampling_rate_hz / 2
    highest = 15 + np.log(nyquist / 1000) / step if nyquist >= 1000 else nyquist * 3 / 200
    mels = np.linspace(0, highest, bins + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    frequencies = np.linspace(0, nyquist, fft_samples // 2 + 1)[:, None]
    widths = np.diff(corners)
    rising = (frequencies - corners[:-2]) / widths[:-1]
    falling = (corners[2:] - frequencies) / widths[1:]
    triangles: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * (2 / (corners[2:] - corners[:-2]))
    return triangles


def _scaled(spectrum: np.ndarray) -> np.ndarray:
    np.maximum(spectrum, spectrum.max() - np.float32(_RANGE), out=spectrum)
    spectrum += np.float32(4)
    spectrum /= np.float32(4)
    return spectrum
