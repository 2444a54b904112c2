"""The checkpoint that comes in: facts read from its files, without torch and without transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfaccel.artifact.contract import Activation, PoolingMode, Task
from hfaccel.errors import SourceError

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
"""How sound becomes features."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
SENTENCE_TRANSFORMERS_FILES = ("modules.json", "config_sentence_transformers.json")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class SentenceTransformers:
    """What the sentence-transformers files of a checkpoint ask for beyond the transformer itself.

    ``max_length`` counts tokens, special tokens included; None where the files leave it to the tokenizer. ``lowercase`` is
    ``do_lower_case`` of those files: lower the text before the tokenizer sees it.
    """

    pooling: PoolingMode
    normalize: bool
    max_length: int | None
    lowercase: bool


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint whose files were found readable and complete.

    Attributes:
        id: folder or hub id as the user gave it.
        revision: commit of the hub repository; None for a local folder.
        folder: where the files lie.
        config: content of ``config.json``.
        model_type: architecture family as transformers names it.
        task: what the model is compiled for.
        weight_files: weight file names relative to ``folder``, sorted.
        weight_bytes: their sizes added up.
        sha256: over config, tokenizer files, sentence-transformers files and weights.
        trust_remote_code: whether Python code of the checkpoint may run.
        allow_pickle: whether pickled weights may be read.
        dequantized_from: name of the GGUF file that ``folder`` was made of; None for any other checkpoint.
        sentence_transformers: of the task ``sentence-similarity`` only.
        activation: what makes the score of a pair; of the task ``text-ranking`` only.
    """

    id: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    model_type: str
    task: Task
    weight_files: tuple[str, ...]
    weight_bytes: int
    sha256: str
    trust_remote_code: bool = False
    allow_pickle: bool = False
    dequantized_from: str | None = None
    sentence_transformers: SentenceTransformers | None = None
    activation: Activation | None = None

    @property
    def vocabulary_size(self) -> int:
        """Token ids lie below this; 2 where the config does not say, which every vocabulary has."""
        return int(self.config.get("vocab_size") or 2)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        SourceError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise SourceError(f"is not valid JSON: {error}", where=str(path), hint="download the file again") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file.

    Raises:
        SourceError: the file cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise SourceError("is not a JSON object", where=str(path), hint="download the file again")
    return value


def hash_files(folder: Path, names: Iterable[str]) -> str:
    """The sha256 over the names, sizes and bytes of the files that exist; files are streamed, never held whole."""
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        path = folder / name
        if not path.is_file():
            continue
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
