"""Sounds to time speech models with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.errors import DataError
from hfaccel.evaluate.dataset import load_dataset
from hfaccel.runtime.speech.audio import load_sound

if TYPE_CHECKING:
    from hfaccel.artifact.generation import SpeechSettings

MOST_CLIPS = 100
"""Every engine transcribes each of them at least seven times."""
_ALL = 1_000_000_000


@dataclass(frozen=True)
class Clip:
    """A sound in memory.

    Attributes:
        name: its file.
        samples: float32 [samples], at the rate of the model.
        seconds: its length.
        references: accepted transcripts; none where the data has none.
    """

    name: str
    samples: np.ndarray
    seconds: float
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clips:
    """What is timed of some data.

    Attributes:
        clips: in the order of the data.
        of: how many sounds the data has.
        longer: how many of those that were read are longer than a window of the encoder, and left out.
    """

    clips: tuple[Clip, ...]
    of: int
    longer: int


def read_clips(data: str, speech: SpeechSettings) -> Clips:
    """Read the sounds of a data set into memory; of a large one :data:`MOST_CLIPS`, spread evenly.

    How a sound that is longer than a window is cut differs from engine to engine, so none is timed.

    Args:
        data: as ``--data`` of ``hfaccel compile`` has it: a file with paths of sounds, with or without transcripts.
        speech: of the model.

    Raises:
        DataError: the data or a sound cannot be read, or no sound fits into a window.
    """
    examples = load_dataset(data, task="automatic-speech-recognition", max_examples=_ALL, seed=0).examples
    count = min(MOST_CLIPS, len(examples))
    chosen = [examples[index * len(examples) // count] for index in range(count)]
    clips = []
    for example in chosen:
        samples = load_sound(str(example.text), speech.sampling_rate_hz)
        clips.append(Clip(str(example.text), samples, samples.size / speech.sampling_rate_hz, example.answers))
    short = tuple(clip for clip in clips if clip.seconds <= speech.window_seconds)
    if not short:
        raise DataError(
            f"no sound is shorter than the {speech.window_seconds} s that the encoder reads at once",
            where=data,
            hint="cut them into shorter clips",
        )
    return Clips(short, len(examples), len(clips) - len(short))
