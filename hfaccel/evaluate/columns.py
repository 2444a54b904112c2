"""From a row of named columns to an :class:`Example`: which column plays which role, and what its values mean."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hfaccel.artifact.contract import Task
from hfaccel.errors import DataError
from hfaccel.evaluate.example import Example, TextInput

Role = Literal["text", "text_pair", "words", "label", "entities", "context", "answers", "audio", "slice"]

# Columns that form a pair only together; looked for before single columns, because "question" alone is also a text.
PAIRS: tuple[tuple[str, str], ...] = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("query", "document"),
    ("query", "passage"),
)
_TEXT = ("text", "sentence", "content", "review", "question", "query", "input", "sentence1", "premise", "title")
_SCORE = ("score", "label", "labels", "similarity", "similarity_score", "relevance", "gold_score")
_WRITTEN_ANSWERS = ("answer", "answers", "target", "reference", "references", "completion", "response", "output")
SYNONYMS: Mapping[Task, Mapping[Role, tuple[str, ...]]] = {
    "text-classification": {"text": _TEXT, "text_pair": (), "label": ("label", "labels", "score", "class", "category", "target")},
    "token-classification": {
        "words": ("words", "tokens"),
        "text": ("text", "sentence"),
        "label": ("ner_tags", "tags", "labels", "label", "pos_tags"),
        "entities": ("entities", "spans"),
    },
    "question-answering": {
        "text": ("question", "query", "text"),
        "context": ("context", "passage", "document"),
        "answers": ("answers", "answer", "label", "labels"),
    },
    "sentence-similarity": {"text": _TEXT, "text_pair": (), "label": _SCORE},
    "text-ranking": {
        "text": ("query", "question", "text"),
        "text_pair": ("document", "passage", "text_pair", "doc", "context", "answer", "text"),
        "label": _SCORE,
    },
    "fill-mask": {"text": _TEXT},
    "feature-extraction": {"text": _TEXT},
    "text-generation": {"text": ("text", "prompt", "instruction", *_TEXT[1:]), "answers": _WRITTEN_ANSWERS},
    "text2text-generation": {
        "text": ("source", "text", "input", "document", "article", "dialogue", "passage", "question", "sentence"),
        "answers": ("target", "reference", "references", "summary", "highlights", "translation", "answer", "answers", "output"),
    },
    "automatic-speech-recognition": {
        "audio": ("audio", "file", "path", "sound"),
        "answers": ("text", "sentence", "transcript", "transcription"),
    },
}
_ALIASES: Mapping[str, Role] = {"question": "text", "query": "text", "document": "text_pair", "score": "label", "tags": "label"}
"""Roles by other names, as users may map them."""
_WRITTEN_ALIASES: Mapping[Task, Mapping[str, Role]] = {
    "text-generation": {
        **dict.fromkeys(SYNONYMS["text-generation"]["text"], "text"),
        **dict.fromkeys(SYNONYMS["text-generation"]["answers"], "answers"),
    },
    "text2text-generation": {
        **dict.fromkeys(SYNONYMS["text2text-generation"]["text"], "text"),
        **dict.fromkeys(SYNONYMS["text2text-generation"]["answers"], "answers"),
    },
    "automatic-speech-recognition": {
        **dict.fromkeys(SYNONYMS["automatic-speech-recognition"]["audio"], "audio"),
        **dict.fromkeys((*SYNONYMS["automatic-speech-recognition"]["answers"], "reference"), "answers"),
    },
}
"""Of tasks whose answers are written, the usual names of columns are names of their roles, too."""
# Of every task: what the examples are told apart by in the accuracy gate.
SLICE_COLUMNS = ("language", "lang", "slice")
REQUIRED: Mapping[Task, tuple[Role, ...]] = {
    "question-answering": ("text", "context"),
    "text-ranking": ("text", "text_pair"),
    "automatic-speech-recognition": ("audio",),
}
REFERENCE_ROLES: tuple[Role, ...] = ("label", "entities", "answers")


def find_roles(found: Sequence[str], task: Task, columns: Mapping[str, str], where: str) -> dict[Role, str]:
    """Which column plays which role.

    Args:
        found: column names of the data.
        task: decides the roles.
        columns: role -> column, as the user mapped them; ``question``, ``query`` and ``document`` are accepted as roles too, and
            where answers are written the usual names of columns (``source``, ``target``, ``transcript`` and the like).
        where: file, for messages.

    Raises:
        DataError: a mapped or required column is missing, or a column looks like a misspelt label column.
    """
    synonyms: Mapping[Role, tuple[str, ...]] = {**SYNONYMS[task], "slice": SLICE_COLUMNS}
    by_lower = {name.strip().lower(): name for name in found}
    roles: dict[Role, str] = {}
    for asked, column in columns.items():
        role = _WRITTEN_ALIASES.get(task, _ALIASES).get(asked, asked)
        if role not in synonyms:
            raise DataError(f"'{asked}' is not a role of {task} data", where=where, hint=f"roles: {', '.join(synonyms)}")
        if column not in found:
            raise DataError(f"no column '{column}'; found: {', '.join(found)}", where=where, hint=_closest(column, found))
        roles[role] = column  # type: ignore[index]  # checked against the roles of the task above
    if "text_pair" in synonyms and not roles.keys() & {"text", "text_pair"}:
        pair = next((pair for pair in PAIRS if pair[0] in by_lower and pair[1] in by_lower), None)
        if pair is not None:
            roles["text"], roles["text_pair"] = by_lower[pair[0]], by_lower[pair[1]]
    for role, names in synonyms.items():
        taken = set(roles.values())
        match = next((by_lower[name] for name in names if name in by_lower and by_lower[name] not in taken), None)
        if role not in roles and match is not None:
            roles[role] = match
    _check_roles(roles, found, task, where)
    return roles


def _check_roles(roles: Mapping[Role, str], found: Sequence[str], task: Task, where: str) -> None:
    synonyms = SYNONYMS[task]
    required: tuple[Role, ...] = REQUIRED.get(task, ("text",))
    if task == "token-classification" and "words" in roles:
        required = ()
    for role in required:
        if role not in roles:
            expected = synonyms[role] or ("text_pair",)
            if task == "token-classification":
                expected = (*synonyms["words"], *expected)
            raise DataError(
                f"no {role} column for {task}; found: {', '.join(found)}; expected one of: {', '.join(expected)}",
                where=where,
                hint=_closest_of(expected, found) or f"map it with {role}=COLUMN",
            )
    references = [role for role in REFERENCE_ROLES if role in synonyms]
    if references and not any(role in roles for role in references):
        others = [name for name in found if name not in roles.values()]
        for expected_name in (name for role in references for name in synonyms[role]):
            close = difflib.get_close_matches(expected_name, others, n=1, cutoff=0.75)
            if close:
                raise DataError(
                    f"no column '{expected_name}', but '{close[0]}' looks like it",
                    where=where,
                    hint=f"rename the column, or map it with {references[0]}={close[0]}",
                )


def _closest_of(expected: Sequence[str], found: Sequence[str]) -> str | None:
    for name in expected:
        close = difflib.get_close_matches(name, found, n=1)
        if close:
            return f"did you mean '{close[0]}' for '{name}'? Rename it, or map the column"
    return None


def _closest(name: str, found: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, found, n=1)
    return f"did you mean '{close[0]}'?" if close else "name an existing column"


@dataclass(frozen=True)
class RowParser:
    """Turns rows into examples.

    Attributes:
        task: decides what the label means.
        roles: role -> column.
        labels: label names of the model in id order; empty when not known, then labels stay as they are.
        class_names: names of the data's classes in id order, where the data has ids behind its names; a model whose labels have
            no names (LABEL_0, LABEL_1) is taken to have the same order.
        found: some labels of the data, for messages.
        folder: what paths of sound files are relative to.
    """

    task: Task
    roles: Mapping[Role, str]
    labels: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    folder: Path = Path()

    @property
    def labelled(self) -> bool:
        """Whether the data carries references."""
        return any(role in self.roles for role in REFERENCE_ROLES)

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """One example.

        Raises:
            DataError: a value or a sound file is missing, a label is not known, or tags and words differ in number.
        """
        made = self._example(row, where)
        value = row.get(self.roles["slice"]) if "slice" in self.roles else None
        return made if value is None or value == "" else replace(made, slice=str(value))

    def _example(self, row: Mapping[str, Any], where: str) -> Example:
        if self.task == "token-classification":
            return self._tagged(row, where)
        if self.task == "automatic-speech-recognition":
            return Example(text=self._sound(row, where), answers=self._written(row, where))
        first = self._string(row, "text", where)
        if self.task in ("text-generation", "text2text-generation"):
            return Example(text=first, answers=self._written(row, where))
        if self.task == "question-answering":
            answers = _answers(row.get(self.roles["answers"])) if "answers" in self.roles else ()
            return Example(text=first, context=self._string(row, "context", where), answers=answers)
        text: TextInput = first
        if "text_pair" in self.roles:
            text = (first, self._string(row, "text_pair", where))
        return Example(text=text, label=self._label(row, where) if "label" in self.roles else None)

    def _string(self, row: Mapping[str, Any], role: Role, where: str) -> str:
        value = row.get(self.roles[role])
        if not isinstance(value, str) or not value.strip():
            found = "nothing" if value is None or isinstance(value, str) else type(value).__name__
            raise DataError(
                f"column '{self.roles[role]}' holds {found} where text is needed", where=where, hint="fill or remove the row"
            )
        return value

    def _written(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """The accepted answers; none where the data has no column of them."""
        if "answers" not in self.roles:
            return ()
        found = tuple(answer for answer in _answers(row.get(self.roles["answers"])) if answer.strip())
        if not found:
            raise DataError(
                f"column '{self.roles['answers']}' holds no reference answer",
                where=where,
                hint="fill or remove the row, or leave the column out",
            )
        return found

    def _sound(self, row: Mapping[str, Any], where: str) -> str:
        """Path of the sound file; as data sets give it, it may stand inside an object."""
        value = row.get(self.roles["audio"])
        if isinstance(value, Mapping):
            value = value.get("path")
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"column '{self.roles['audio']}' names no sound file", where=where, hint="fill the row with a path, or remove it"
            )
        path = self.folder / value.strip()
        if not path.is_file():
            relative = "" if Path(value.strip()).is_absolute() else f"; paths are relative to {self.folder}"
            what = "a folder" if path.is_dir() else "missing"
            raise DataError(f"the sound file '{value}' is {what}{relative}", where=where, hint="correct or remove the row")
        if path.stat().st_size == 0:
            raise DataError(f"the sound file '{value}' is empty", where=where, hint="replace it, or remove the row")
        return str(path)

    def _label(self, row: Mapping[str, Any], where: str) -> Any:
        column = self.roles["label"]
        value = _decoded(row.get(column))
        if value is None or value == "":
            raise DataError(f"column '{column}' holds no label", where=where, hint="label every row, or leave the column out")
        if self.task != "text-classification" or (len(self.labels) == 1 and not isinstance(value, list)):
            try:
                return float(value)
            except (TypeError, ValueError):
                raise DataError(f"'{value}' in column '{column}' is not a number", where=where, hint="give a number") from None
        if isinstance(value, list):
            return self._label_set(value, where)
        return self._label_id(value, where)

    def _label_set(self, values: list[Any], where: str) -> tuple[Any, ...]:
        """Ids of a multi-label value: names, ids, or one 0/1 per label (a list of 0/1 as long as the labels is always that)."""
        if (
            self.labels
            and len(values) == len(self.labels)
            and all(value in (0, 1) and not isinstance(value, str) for value in values)
        ):
            return tuple(index for index, value in enumerate(values) if value)
        return tuple(self._label_id(value, where) for value in values)

    def _label_id(self, value: Any, where: str) -> Any:
        if not self.labels:
            return value
        name = str(value).strip()
        if name in self.labels:
            return self.labels.index(name)
        lower = [label.lower() for label in self.labels]
        if lower.count(name.lower()) == 1:
            return lower.index(name.lower())
        number = re.fullmatch(r"(?:LABEL_)?(\d+)(?:\.0+)?", name)
        if number and int(number[1]) < len(self.labels):
            return int(number[1])
        generic = all(re.fullmatch(r"LABEL_\d+", label) for label in self.labels)
        if generic and name in self.class_names and len(self.class_names) == len(self.labels):
            return self.class_names.index(name)
        close = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f"did you mean '{self.labels[lower.index(close[0])]}'?" if close else "use label names or ids of the model"
        if generic:
            hint = "the model's labels have no names: write ids (0, 1, ...) in the order that it was trained with"
        data_has = f"the data has: {_shown(self.found)}; " if self.found else ""
        raise DataError(f"unknown label '{value}'; {data_has}the model knows: {_shown(self.labels)}", where=where, hint=hint)

    def _tagged(self, row: Mapping[str, Any], where: str) -> Example:
        if "words" in self.roles:
            value = _decoded(row.get(self.roles["words"]))
            words = tuple(str(word) for word in (value.split() if isinstance(value, str) else value or ()))
            if not words:
                raise DataError(f"column '{self.roles['words']}' holds no words", where=where, hint="fill or remove the row")
            text = " ".join(words)
            starts = [sum(len(word) + 1 for word in words[:index]) for index in range(len(words))]
            spans = tuple((start, start + len(word)) for start, word in zip(starts, words, strict=True))
        else:
            text = self._string(row, "text", where)
            spans = tuple(match.span() for match in re.finditer(r"\w+|[^\w\s]", text))
            words = tuple(text[start:end] for start, end in spans)
        tags: tuple[str, ...] | None = None
        if "label" in self.roles:
            tags = self._tags(_decoded(row.get(self.roles["label"])), len(words), where)
        elif "entities" in self.roles:
            tags = self._tags(_tags_of_entities(_decoded(row.get(self.roles["entities"])), spans, where), len(words), where)
        return Example(text=text, label=tags, words=words, word_spans=spans)

    def _tags(self, value: Any, count: int, where: str) -> tuple[str, ...]:
        given = value.split() if isinstance(value, str) else list(value or ())
        if len(given) != count:
            raise DataError(f"{count} words but {len(given)} tags", where=where, hint="give one tag per word")
        types = {label[2:] for label in self.labels if label[:2] in ("B-", "I-", "E-", "S-")}
        tags: list[str] = []
        for tag in given:
            name = str(tag)
            # B- and I- schemes differ between models; entity types are what counts.
            if not self.labels or name in self.labels or name == "O" or (name[:2] in ("B-", "I-") and name[2:] in types):
                tags.append(name)
            else:
                tags.append(self.labels[self._label_id(tag, where)])
        return tuple(tags)


def values_of(cells: Iterable[Any]) -> tuple[str, ...]:
    """The distinct values of a column, also inside its lists, sorted."""
    values: set[str] = set()
    for cell in cells:
        value = _decoded(cell)
        values.update(str(item) for item in (value if isinstance(value, list) else [value]) if item is not None)
    return tuple(sorted(values))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _decoded(value: Any) -> Any:
    """Lists inside CSV cells are written as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _answers(value: Any) -> tuple[str, ...]:
    """Answers as a string, a list of strings, or SQuAD's ``{"text": [...]}``."""
    value = _decoded(value)
    if isinstance(value, dict):
        value = value.get("text")
    if value is None or value == "":
        return ()
    return tuple(
        str(item.get("text", "") if isinstance(item, dict) else item) for item in (value if isinstance(value, list) else [value])
    )


def _tags_of_entities(entities: Any, spans: tuple[tuple[int, int], ...], where: str) -> list[str]:
    """BIO tags from character spans ``{"start", "end", "label"}`` or ``[start, end, label]``."""
    tags = ["O"] * len(spans)
    for entity in entities or ():
        try:
            if isinstance(entity, dict):
                start, end = int(entity["start"]), int(entity["end"])
                label = str(entity.get("label") or entity["type"])
            else:
                start, end, label = int(entity[0]), int(entity[1]), str(entity[2])
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(
                f"an entity needs start, end and label, found {entity!r}",
                where=where,
                hint='write {"start": 0, "end": 5, "label": "PER"}',
            ) from None
        inside = [index for index, (first, last) in enumerate(spans) if first < end and last > start]
        for position, index in enumerate(inside):
            tags[index] = f"{'I' if position else 'B'}-{label}"
    return tags
