"""What all tests share: no model hub, and real checkpoints on request."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before any test imports a Hugging Face library, which reads it at import.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent
DOWNLOAD_FAILED = 3

RealAsset = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def real_asset() -> RealAsset:
    """Make a real asset by name and give one of its paths; skips when a download fails and fails on anything else.

    ``HFACCEL_REAL_DIR`` says where they are kept; the default is the folder of ``make demo``, so that nothing is fetched twice.
    """
    root = Path(os.environ.get("HFACCEL_REAL_DIR", REPOSITORY / "demo")).resolve()

    def get(name: str, path: str) -> Path:
        program = REPOSITORY / "tests" / "real" / "checkpoints.py"
        finished = subprocess.run([sys.executable, str(program), str(root), name], capture_output=True, text=True, check=False)
        if finished.returncode == DOWNLOAD_FAILED:
            pytest.skip(f"{name} could not be downloaded: {finished.stderr.strip()}")
        if finished.returncode != 0:
            pytest.fail(f"{name} could not be made:\n{finished.stderr}")
        return root / path

    return get


@pytest.fixture(scope="session")
def minilm_checkpoint(real_asset: RealAsset) -> Path:
    """Sentence embedding, 6 layers, hidden size 384."""
    return real_asset("minilm-l6-v2", "checkpoints/minilm-l6-v2")


@pytest.fixture(scope="session")
def rampart_checkpoint(real_asset: RealAsset) -> Path:
    """Token classification, 35 BIO labels."""
    return real_asset("rampart-pii-ner", "checkpoints/rampart-pii-ner")


@pytest.fixture(scope="session")
def sentiment_checkpoint(real_asset: RealAsset) -> Path:
    """Text classification, NEGATIVE and POSITIVE."""
    return real_asset("minilm-sentiment-probe", "checkpoints/minilm-sentiment-probe")


@pytest.fixture(scope="session")
def lee_pairs(real_asset: RealAsset) -> Path:
    """CSV: text1, text2, score."""
    return real_asset("lee", "data/lee-pairs.csv")


@pytest.fixture(scope="session")
def lee_background(real_asset: RealAsset) -> Path:
    """News, a text a line."""
    return real_asset("lee", "data/lee-background.txt")


@pytest.fixture(scope="session")
def movie_reviews_train(real_asset: RealAsset) -> Path:
    """CSV: text, label; 6000 rows."""
    return real_asset("movie-reviews", "data/movie-reviews-train.csv")


@pytest.fixture(scope="session")
def movie_reviews_test(real_asset: RealAsset) -> Path:
    """CSV: text, label; the 1500 held-out rows."""
    return real_asset("movie-reviews", "data/movie-reviews-test.csv")


@pytest.fixture(scope="session")
def pii_sentences(real_asset: RealAsset) -> Path:
    """JSON lines: words, tags."""
    return real_asset("pii-sentences", "data/pii-sentences.jsonl")
