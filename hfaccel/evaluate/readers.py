"""Rows out of data files: each format becomes ``(line number, {column: value})``; nothing here knows about tasks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hfaccel.errors import DataError, MissingExtraError

Row = tuple[int, Mapping[str, Any]]


def read_rows(path: Path) -> list[Row]:
    """All rows of a data file with their line numbers (row numbers for Parquet), starting at 1.

    Raises:
        DataError: the file is empty, is not UTF-8, has a row that cannot be parsed or a name ending that is not known.
        MissingExtraError: Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"the ending '{path.suffix}' is not a known data format", where=str(path), hint=f"use {', '.join(READERS)}"
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=str(path), hint="give a file with at least one example")
    rows = READERS[suffix](path)
    if not rows:
        raise DataError("the file holds no examples", where=str(path), hint="give a file with at least one example")
    return rows


def _text(path: Path) -> str:
    """The whole file as text, without a byte order mark."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"the file is not UTF-8: byte 0x{data[error.start]:02x}", where=f"{path}:{line}", hint="save it with UTF-8 encoding"
        ) from error


def _lines(path: Path) -> list[Row]:
    return [(number, {"text": line.strip()}) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]


def _csv(path: Path) -> list[Row]:
    return _delimited(path, ",")


def _tsv(path: Path) -> list[Row]:
    return _delimited(path, "\t")


def _delimited(path: Path, delimiter: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        columns = list(reader.fieldnames or ())
        for row in reader:
            line = reader.line_num
            if None in row or None in row.values():
                found = sum(len(value) if isinstance(value, list) else value is not None for value in row.values())
                raise DataError(
                    f"the row has {found} fields, the header has {len(columns)}",
                    where=f"{path}:{line}",
                    hint="put fields that hold the separator or line breaks in double quotes",
                )
            rows.append((line, row))
    except csv.Error as error:
        raise DataError(
            f"the row cannot be parsed: {error}", where=f"{path}:{reader.line_num}", hint="check the quotes"
        ) from error
    return rows


def _json(path: Path) -> list[Row]:
    """A list of objects, an object with such a list under ``data``, or JSON Lines."""
    text = _text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            raise DataError(f"not valid JSON: {error}", where=f"{path}:{line}", hint="give a list of objects") from error
        return _json_lines(path)
    items = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise DataError("expected a list of objects", where=str(path), hint='write [{"text": ..., "label": ...}, ...]')
    return [(number, _object(item, f"{path}: item {number}")) for number, item in enumerate(items, start=1)]


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"the line is not valid JSON: {error}", where=f"{path}:{number}", hint="write one JSON object per line"
            ) from error
        rows.append((number, _object(item, f"{path}:{number}")))
    return rows


def _object(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"expected an object, found {type(item).__name__}", where=where, hint='write {"text": ..., "label": ...}')
    return item


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise MissingExtraError("pyarrow", extra="compile", needed_for="reading Parquet files") from error
    try:
        items = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: {error}", where=str(path), hint="write the file again, or use CSV or JSONL"
        ) from error
    return list(enumerate(items, start=1))


def read_hub_rows(spec: str) -> tuple[list[Row], Mapping[str, tuple[str, ...]]]:
    """Rows of a ``datasets`` name ``name[:config[:split]]``; class ids become class names. The split defaults to ``test``.

    Returns:
        the rows, and per column of classes their names in id order.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        DataError: the data set cannot be loaded, for example without network.
    """
    try:
        import datasets
    except ImportError as error:
        needed_for = f"there is no file '{spec}', and a data set of that name"
        raise MissingExtraError("datasets", extra="datasets", needed_for=needed_for) from error
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # network, parsing and naming faults of many libraries arrive here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the data set could not be loaded: {reason}",
            where=spec,
            hint="if this is a file, check its path; else check name:config:split and the network, or export it to JSONL",
        ) from error
    named = {column: _class_names(feature) for column, feature in loaded.features.items()}
    rows: list[Row] = [
        (number, {key: _with_names(value, named.get(key)) for key, value in row.items()})
        for number, row in enumerate(loaded, start=1)
    ]
    return rows, {column: names for column, names in named.items() if names}


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Names of a class column or of a list of classes."""
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return tuple(names) if names else None


def _with_names(value: Any, names: tuple[str, ...] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_with_names(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _lines,
}
