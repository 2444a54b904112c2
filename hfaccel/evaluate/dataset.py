"""Evaluation data: loading it from files or from the hub, and dividing it into calibration and evaluation."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from hfaccel.artifact.contract import Task
from hfaccel.errors import DataError
from hfaccel.evaluate.columns import RowParser, find_roles, values_of
from hfaccel.evaluate.example import Example, TextInput
from hfaccel.evaluate.readers import READERS, Row, read_hub_rows, read_rows

__all__ = ["Dataset", "Example", "TextInput", "digest", "load_dataset"]

SOUND_ENDINGS = (".wav", ".flac", ".mp3", ".ogg")
HOLD_OUT_MINIMUM = 400  # examples; below this the gate needs all of them


@dataclass(frozen=True)
class Dataset:
    """Examples and where they come from.

    Attributes:
        name: file name or data set name, for reports.
        examples: the examples, in the order of the data.
        labelled: whether every example carries its reference.
        sha256: digest of the file, or of the examples where there is no file.
        multilingual_sample: whether this is the packaged sample, used where the user gave no data.
        slice_column: what the ``slice`` of the examples is, for example ``language``.
        separate_pairs: the model reads the two texts of a pair one after the other (sentence-similarity), not together.
    """

    name: str
    examples: tuple[Example, ...]
    labelled: bool
    sha256: str
    multilingual_sample: bool = False
    separate_pairs: bool = False
    slice_column: str = "slice"

    def texts(self) -> tuple[TextInput, ...]:
        """Every distinct input of the model, in order of first appearance: texts, or pairs that are read together."""
        return tuple(dict.fromkeys(text for example in self.examples for text in self._inputs(example)))

    def _inputs(self, example: Example) -> tuple[TextInput, ...]:
        if self.separate_pairs and isinstance(example.text, tuple):
            return example.text
        return (example.model_input,)

    def clusters(self) -> tuple[tuple[int, ...], ...] | None:
        """Per example the numbers of the texts it is made of; None when no two examples share a text."""
        numbers: dict[str, int] = {}
        clusters: list[tuple[int, ...]] = []
        for example in self.examples:
            parts = (example.model_input,) if isinstance(example.model_input, str) else example.model_input
            clusters.append(tuple(numbers.setdefault(part, len(numbers)) for part in dict.fromkeys(parts)))
        shared = sum(len(cluster) for cluster in clusters) > len(numbers)
        return tuple(clusters) if shared else None

    def without_repeats(self) -> Dataset:
        """The first example of each text only: what is calibrated on must not come again among what is judged on."""
        first = {example.text: example for example in reversed(self.examples)}
        return replace(self, examples=tuple(example for example in self.examples if first[example.text] is example))

    def split_calibration(self, count: int, *, hold_out_from: int = HOLD_OUT_MINIMUM) -> tuple[tuple[TextInput, ...], Dataset]:
        """Texts for calibration (their labels are not looked at) and the data to evaluate on.

        Examples are held out only where enough are there and none shares a text with another; else the texts serve both.

        Args:
            count: how many examples (held out) or texts (shared) to calibrate with.
            hold_out_from: how many examples are enough; the gate needs all of fewer.

        Returns:
            the texts, and the data set without the examples held out.
        """
        total = len(self.examples)
        if total >= hold_out_from and self.clusters() is None:
            held_out = set(_spread(total, min(count, total // 4)))
            chosen = replace(self, examples=tuple(self.examples[index] for index in sorted(held_out)))
            rest = tuple(example for index, example in enumerate(self.examples) if index not in held_out)
            return chosen.texts(), replace(self, examples=rest)
        texts = self.texts()
        return tuple(texts[index] for index in _spread(len(texts), min(count, len(texts)))), self


def _spread(total: int, count: int) -> list[int]:
    """``count`` indices spread evenly, so that data sorted by label or length is covered."""
    return [index * total // count for index in range(count)]


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the examples, for data that is not one file."""
    content = json.dumps([astuple(example) for example in examples], ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def load_dataset(
    spec: str,
    *,
    task: Task,
    columns: Mapping[str, str] = {},
    labels: Sequence[str] = (),
    max_examples: int,
    seed: int,
) -> Dataset:
    """Load evaluation data.

    Args:
        spec: a CSV, TSV, JSON, JSONL, Parquet or plain text file, or a ``datasets`` name as ``name:config:split``. Sound files
            are named in such a file, by paths relative to it.
        task: decides which columns are looked for.
        columns: role -> column, where the names are not the usual ones.
        labels: label names of the model in id order, to check and translate the labels of the data.
        max_examples: larger data is sampled down to this many examples.
        seed: of that sample.

    Raises:
        DataError: the file or a sound file is missing, empty, not parsable, or lacks columns or known labels.
        MissingExtraError: Parquet without pyarrow, or a data set name without ``datasets``.
    """
    path = Path(spec)
    is_file = path.suffix.lower() in READERS or path.exists()
    rows, class_names = (_rows_of_file(path, task), {}) if is_file else read_hub_rows(spec)
    if not rows:
        raise DataError("the data set holds no examples", where=spec, hint="choose another split")
    found = list(dict.fromkeys(column for _, row in rows for column in row))
    if path.suffix.lower() == ".txt" and task in ("question-answering", "text-ranking"):
        raise DataError(f"a text file has one text per line, but {task} needs two", where=spec, hint="use CSV or JSONL")
    roles = find_roles(found, task, columns, spec)
    label_column = roles.get("label", "")
    parser = RowParser(
        task,
        roles,
        tuple(labels),
        class_names.get(label_column, ()),
        values_of((row.get(label_column) for _, row in rows)),
        path.parent if is_file else Path(),
    )
    examples = [parser.example(row, f"{spec}:{number}") for number, row in rows]
    if len(examples) > max_examples:
        chosen = np.sort(np.random.default_rng(seed).choice(len(examples), max_examples, replace=False))
        examples = [examples[index] for index in chosen]
    return Dataset(
        name=path.name if is_file else spec,
        examples=tuple(examples),
        labelled=parser.labelled,
        sha256=_content_digest(path, task, examples) if is_file else digest(examples),
        separate_pairs=task == "sentence-similarity",
        slice_column=roles.get("slice", "slice"),
    )


def _content_digest(path: Path, task: Task, examples: Sequence[Example]) -> str:
    """SHA-256 of the data file, and of the sound files that it names."""
    content = hashlib.sha256(path.read_bytes())
    if task == "automatic-speech-recognition":
        for sound in dict.fromkeys(str(example.text) for example in examples):
            content.update(hashlib.sha256(Path(sound).read_bytes()).digest())
    return content.hexdigest()


def _rows_of_file(path: Path, task: Task) -> list[Row]:
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean '{path.with_name(close[0])}'?" if close else "check the path"
        raise DataError("no such file", where=str(path), hint=hint)
    if path.is_dir():
        hint = f"give a file: {', '.join(READERS)}"
        if task == "automatic-speech-recognition":
            hint = (
                "write a CSV beside the sound files, with the columns audio (their paths) and text (what is said), and give that"
            )
        raise DataError("this is a folder, not a data file", where=str(path), hint=hint)
    if task == "automatic-speech-recognition" and path.suffix.lower() in SOUND_ENDINGS:
        hint = "write a CSV with the columns audio (paths of sound files) and text (what is said), and give that"
        raise DataError("this is a sound file, not a data file", where=str(path), hint=hint)
    return read_rows(path)
