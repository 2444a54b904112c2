"""The Lee documents: 50 news texts with human similarity ratings of every pair, and 300 background texts."""

from __future__ import annotations

import csv
import io
from itertools import combinations
from pathlib import Path

from packages import GENSIM, fetch, read_wheel_member, write_text_at_once

DATA_FOLDER = "gensim/test/test_data/"
DOCUMENTS = 50


def write_lee(data: Path, cache: Path) -> None:
    """Write ``lee-pairs.csv`` (columns text1, text2, score; 1225 pairs) and ``lee-background.txt`` (a text a line, 300 lines)."""
    wheel = fetch(GENSIM, cache)
    documents = _lines(wheel, "lee.cor")
    ratings = [row.split() for row in read_wheel_member(wheel, f"{DATA_FOLDER}similarities0-1.txt").decode("ascii").splitlines()]
    if len(documents) != DOCUMENTS or any(len(row) != DOCUMENTS for row in ratings):
        raise ValueError(f"expected {DOCUMENTS} documents and a square table of ratings")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("text1", "text2", "score"))
    for first, second in combinations(range(DOCUMENTS), 2):
        writer.writerow((documents[first], documents[second], ratings[first][second]))
    write_text_at_once(data / "lee-background.txt", "\n".join(_lines(wheel, "lee_background.cor")) + "\n")
    write_text_at_once(data / "lee-pairs.csv", table.getvalue())


def _lines(wheel: Path, name: str) -> list[str]:
    text = read_wheel_member(wheel, f"{DATA_FOLDER}{name}").decode("latin-1")
    # Not splitlines(): latin-1 control characters inside a text would split it.
    return [" ".join(line.split()) for line in text.split("\n") if line.strip()]
