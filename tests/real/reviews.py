"""Movie-review sentences rated by people from -4 (negative) to 4 (positive)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from packages import VADER, fetch, read_nested_tar_member, write_text_at_once

TEST_EXAMPLES = 1500
TRAIN_EXAMPLES = 6000
# Sentences rated nearer to zero than this are neutral to most raters.
SMALLEST_RATING = 0.5


@dataclass(frozen=True)
class Review:
    """One sentence with its class, ``POSITIVE`` or ``NEGATIVE``."""

    text: str
    label: str


def write_movie_reviews(data: Path, cache: Path) -> None:
    """Write ``movie-reviews-train.csv`` (6000) and ``movie-reviews-test.csv`` (1500), columns text and label, without overlap."""
    blob = read_nested_tar_member(fetch(VADER, cache), "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")
    reviews = parse_reviews(blob.decode("utf-8", errors="replace"))
    order = np.random.RandomState(0).permutation(len(reviews))
    test, train = order[:TEST_EXAMPLES], order[TEST_EXAMPLES : TEST_EXAMPLES + TRAIN_EXAMPLES]
    write_text_at_once(data / "movie-reviews-train.csv", _csv(reviews[index] for index in train))
    write_text_at_once(data / "movie-reviews-test.csv", _csv(reviews[index] for index in test))


def parse_reviews(text: str) -> list[Review]:
    """Rated sentences with a clear leaning, from lines of id, rating and sentence, separated by tabs."""
    rows = [line.rstrip("\r").split("\t") for line in text.split("\n")]
    rated = [(float(row[1]), row[2]) for row in rows if len(row) == 3]
    return [
        Review(sentence, "POSITIVE" if rating > 0 else "NEGATIVE") for rating, sentence in rated if abs(rating) >= SMALLEST_RATING
    ]


def read_reviews(path: Path) -> Sequence[Review]:
    """Read back a file that :func:`write_movie_reviews` wrote."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [Review(row["text"], row["label"]) for row in csv.DictReader(stream)]


def _csv(reviews: Iterable[Review]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("text", "label"))
    writer.writerows((review.text, review.label) for review in reviews)
    return table.getvalue()
