"""One sound while its transcript grows: its windows, and what was understood so far."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from hfaccel.artifact.generation import SpeechSettings
from hfaccel.runtime.speech.fallback import GREEDY
from hfaccel.runtime.speech.features import LogMelFeatures
from hfaccel.runtime.speech.timestamps import TokenSegment, WindowSegments


class Listening:
    """Takes the tokens of one sound, window by window.

    What does not fit into one window is always read with times, because they say where the next window starts.

    Args:
        samples: float32 [samples], mono, at the rate of the model.
        features: of the model.
        settings: of the model.
        end_token_ids: any of them ends the answer to a window.
        timestamps: whether times are wanted of a sound that fits into one window too.

    Attributes:
        timed: whether times are among the tokens.
        long: whether it takes more than one window.
        language: code; None while it is not known.
        fallback: what its answers are judged by.
        generator: source of its draws.
        token_ids: what counts of the answers, times among them, without the tokens that end answers.
        segments: finished ones; none where ``timed`` is false.
    """

    def __init__(
        self,
        samples: np.ndarray,
        features: LogMelFeatures,
        settings: SpeechSettings,
        end_token_ids: Collection[int],
        *,
        timestamps: bool,
    ) -> None:
        self._frames = max(1, samples.size // settings.hop_samples)
        self._window_frames = features.window_frames
        self.long = self._frames > self._window_frames
        self._features = features.of_recording(samples) if self.long else features.of_window(samples)
        self._settings = settings
        self._end_token_ids = end_token_ids
        self.timed = timestamps or self.long
        self.language: str | None = None
        self.fallback = GREEDY
        self.generator = np.random.default_rng(0)
        self.token_ids: list[int] = []
        self.segments: list[TokenSegment] = []
        self._seek = 0
        self._room = 0
        self._silent = False
        self._answer = WindowSegments(settings, 0.0, 0)
        self._fresh: list[int] = []

    @property
    def done(self) -> bool:
        """Whether all of the sound was read."""
        return self._seek >= self._frames

    def next_window(self, room: int) -> None:
        """The tokens that come now are of the next window.

        Args:
            room: most tokens that its answer may have.
        """
        start_seconds = self._seek * self._settings.hop_samples / self._settings.sampling_rate_hz
        self._answer = WindowSegments(self._settings, start_seconds, min(self._frames - self._seek, self._window_frames))
        self._room = room
        self._silent = False

    def window_features(self) -> np.ndarray:
        """Of the next window, float32 [mel_bins, window_frames]; zeros behind the end of the sound."""
        window = self._features[:, self._seek : self._seek + self._window_frames]
        return np.pad(window, ((0, 0), (0, self._window_frames - window.shape[1])))

    def add(self, token: int) -> bool:
        """Take a new token; whether the answer to this window has ended with it."""
        if token in self._end_token_ids:
            return True
        self._room -= 1
        if self.timed:
            self._take_segment(self._answer.push(token))
        else:
            self.token_ids.append(token)
            if token <= self._settings.no_timestamps_token_id:
                self._fresh.append(token)
        return self._room <= 0

    def take(self, tokens: Sequence[int]) -> None:
        """Take a whole answer to this window."""
        for token in tokens:
            if self.add(token):
                return

    def leave_out_window(self) -> None:
        """Nothing was said in this window: it is used up whole, and its answer is empty."""
        self._silent = True

    def end_window(self) -> None:
        """The answer to this window is complete."""
        if not self.timed:
            self._seek = self._frames
            return
        if self._silent:
            self._seek += self._window_frames
            return
        last, token_ids, used = self._answer.finish()
        self._take_segment(last)
        self.token_ids += token_ids
        self._seek += used

    def take_text_ids(self) -> list[int]:
        """Tokens of text since the last call, as far as no later window can change them."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def _take_segment(self, segment: TokenSegment | None) -> None:
        if segment is not None:
            self.segments.append(segment)
            self._fresh += segment.token_ids
