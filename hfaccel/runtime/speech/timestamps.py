"""The times among the tokens of a Whisper model: which may come next, and the segments that they part a window into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hfaccel.artifact.generation import SpeechSettings

_NEVER = np.float32(-np.inf)


def allow_timestamps(logits: np.ndarray, answers: Sequence[Sequence[int]], settings: SpeechSettings) -> np.ndarray:
    """Leave only tokens that go with times in pairs: each segment begins and ends with one, and they never go back.

    The rules of OpenAI's ``ApplyTimestampRules``, as transformers' ``WhisperTimeStampLogitsProcessor`` has them. An answer begins
    with a time, at most ``most_initial_timestamp``. After a text and a time comes another time or the end, after two times a text.
    Where all times together are likelier than any one other token, a time comes.

    Args:
        logits: float32 [batch, vocabulary], of the next token; they stay as they are.
        answers: the tokens of each row so far, without those that it was asked with.
        settings: of the model.

    Returns:
        float32 [batch, vocabulary]; minus infinity for what may not come.
    """
    allowed = logits.copy()
    first_time = settings.no_timestamps_token_id + 1
    allowed[:, settings.no_timestamps_token_id] = _NEVER
    for row, answer in zip(allowed, answers, strict=True):
        _forbid(row, answer, first_time, settings)
        if _times_weigh_more(row, first_time):
            row[:first_time] = _NEVER
    return allowed


def _forbid(row: np.ndarray, answer: Sequence[int], first_time: int, settings: SpeechSettings) -> None:
    """Leave out, in place, what may not follow whatever its logits are."""
    if not answer:
        row[:first_time] = _NEVER
        if settings.most_initial_timestamp is not None:
            row[first_time + settings.most_initial_timestamp + 1 :] = _NEVER
        return
    after_time = answer[-1] >= first_time
    after_two = after_time and (len(answer) < 2 or answer[-2] >= first_time)
    if after_two:
        row[first_time:] = _NEVER
    elif after_time:
        row[: settings.end_of_text_token_id] = _NEVER
    times = [token for token in answer if token >= first_time]
    if times:
        # The end of a segment may be the start of the next; otherwise time has gone on.
        earliest = times[-1] if after_time and not after_two else times[-1] + 1
        row[first_time:earliest] = _NEVER


def _times_weigh_more(row: np.ndarray, first_time: int) -> bool:
    """Whether all times together are likelier than the likeliest other token."""
    times, text = row[first_time:], row[:first_time].max()
    loudest = times.max(initial=_NEVER)
    if loudest == _NEVER:
        return False
    return bool(loudest + np.log(np.exp(times - loudest).sum()) > text)


@dataclass(frozen=True)
class TokenSegment:
    """Tokens between two times of a sound, and these times in seconds from its start. The tokens are text only."""

    start_seconds: float
    end_seconds: float
    token_ids: tuple[int, ...]


class WindowSegments:
    """Parts the tokens of one window into segments while they come; as OpenAI's ``transcribe`` and transformers do it.

    A segment is finished once two times follow each other, its end and the start of the next. What comes behind the last such pair
    is not finished: the window cut it off, and it is left to the next window, which starts at that pair. Two windows are used up
    whole: one without a pair, and one that ends with a single time, behind which nobody spoke.

    Args:
        settings: of the model.
        start_seconds: of the window, from the start of the sound.
        frames: of sound in the window.
    """

    def __init__(self, settings: SpeechSettings, start_seconds: float, frames: int) -> None:
        self._settings = settings
        self._start_seconds = start_seconds
        self._frames = frames
        self._first_time = settings.no_timestamps_token_id + 1
        self._ids: list[int] = []
        # Where the tokens begin that no finished segment has: at the second of the last pair of times.
        self._open_from = 0

    def push(self, token_id: int) -> TokenSegment | None:
        """Take a token; the segment that is finished with it. The token that ends an answer does not belong here."""
        self._ids.append(token_id)
        if len(self._ids) < 2 or not (self._is_time(token_id) and self._is_time(self._ids[-2])):
            return None
        part, self._open_from = self._ids[self._open_from : -1], len(self._ids) - 1
        return self._segment(part)

    def finish(self) -> tuple[TokenSegment | None, list[int], int]:
        """Once no token comes any more.

        Returns:
            The last segment, where what is left makes one; the tokens of the window that count, times among them; and frames after
            which the next window starts, at least one.
        """
        rest = self._ids[self._open_from :]
        if not self._open_from or (len(rest) > 1 and self._is_time(rest[-1]) and not self._is_time(rest[-2])):
            return (self._segment(rest) if rest else None), list(self._ids), self._frames
        step_frames = self._settings.timestamp_step_seconds * self._settings.sampling_rate_hz / self._settings.hop_samples
        used = round((self._ids[self._open_from - 1] - self._first_time) * step_frames)
        return None, self._ids[: self._open_from + 1], min(max(used, 1), self._frames)

    def _segment(self, ids: Sequence[int]) -> TokenSegment:
        times = [token for token in ids if self._is_time(token)]
        start_seconds = self._seconds(ids[0]) if self._is_time(ids[0]) else self._start_seconds
        if times and times[-1] > ids[0]:
            end_seconds = self._seconds(times[-1])
        else:
            end_seconds = self._start_seconds + self._frames * self._settings.hop_samples / self._settings.sampling_rate_hz
            # In what little is left of a sound the model may tell a time that lies behind it.
            start_seconds = start_seconds if start_seconds < end_seconds else self._start_seconds
        text = tuple(token for token in ids if not self._is_time(token))
        return TokenSegment(start_seconds, end_seconds, text)

    def _is_time(self, token_id: int) -> bool:
        return token_id >= self._first_time

    def _seconds(self, time: int) -> float:
        return self._start_seconds + (time - self._first_time) * self._settings.timestamp_step_seconds
