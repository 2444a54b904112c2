"""The tokenizers of transformers that are written in Python, which ran by default before those in Rust: where the way begins."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.measure.peers.open import one_line
from hfaccel.runtime.tokenizer import Encoded, Text, TextTokenizer, open_tokenizer

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract, TextSettings
    from hfaccel.source.model import SourceModel

_VOCABULARY = "vocab.txt"
_LEGACY = "Legacy"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


class PythonTokenizer(TextTokenizer):
    """Ids from a tokenizer in Python, truncated as the contract says; all but :meth:`encode` is done by the artifact's own.

    It does not know where a token stands in the text: offsets are zero and word numbers None, as in the pipelines of transformers
    with such a tokenizer.

    Args:
        library: a tokenizer of transformers.
        folder: holds the ``tokenizer.json`` of the artifact.
        settings: text handling of the contract.
    """

    def __init__(self, library: Any, folder: Path, settings: TextSettings) -> None:
        super().__init__(folder, settings, cache_size=0)
        self._library = library
        self._library.truncation_side = settings.truncation_side

    @property
    def name(self) -> str:
        """Name of its class."""
        return type(self._library).__name__

    @property
    def origin(self) -> str:
        """Who runs it: the name of its class, and what it was called while transformers gave it out."""
        former = self.name.removesuffix(_LEGACY)
        return f"{self.name} of transformers" + (f", which was {former} before version 5" if former != self.name else "")

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokenize texts or pairs in one call of the library, in the given order."""
        rows: list[tuple[str, ...]] = [(text,) if isinstance(text, str) else text for text in texts]
        if self.settings.lowercase:
            rows = [tuple(part.lower() for part in row) for row in rows]
        found = self._library(
            *(list(column) for column in zip(*rows, strict=True)),
            truncation=True,
            max_length=self.settings.max_length,
            return_token_type_ids=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        columns = (found["input_ids"], found["token_type_ids"], found["special_tokens_mask"])
        return [_encoded(*row) for row in zip(*columns, strict=True)]


def load_python_tokenizer(source: SourceModel, folder: Path) -> Any:
    """The tokenizer in Python that the installed transformers has for a checkpoint, or why there is none.

    transformers 5 gives most models a tokenizer in Rust whatever is asked for, and keeps the one in Python that version 4 had for
    some under another name (``BertTokenizerLegacy``).

    Args:
        source: the checkpoint.
        folder: of the artifact; the vocabulary in its ``tokenizer.json`` stands in for a missing ``vocab.txt``.

    Returns:
        A tokenizer of transformers, or a ``str`` that says in one line why there is none.
    """
    import transformers

    from hfaccel.source.torch_model import quiet_transformers

    try:
        with quiet_transformers():
            found: Any = transformers.AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=source.trust_remote_code, use_fast=False
            )
            if not found.is_fast:
                return found
            names = [kind.__name__ + _LEGACY for kind in type(found).__mro__]
            legacy = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
            if legacy is not None and legacy.vocab_files_names == {"vocab_file": _VOCABULARY}:
                return _load_legacy(legacy, source.folder, folder)
    except Exception as error:  # tokenizers fail in any way; the way goes on without the step
        return f"the tokenizer in Python does not load: {one_line(error)}"
    return (
        f"transformers {transformers.__version__} has no tokenizer in Python for this model, {type(found).__name__} runs in Rust"
    )


def python_tokenizer(source: SourceModel, folder: Path, contract: Contract, texts: Sequence[Text]) -> PythonTokenizer | str:
    """The tokenizer in Python of a model that reads texts, if it gives the ids that the artifact's gives; else why not.

    Args:
        source: the checkpoint.
        folder: of the artifact.
        contract: of the artifact.
        texts: on which ids and token types must be the same.
    """
    if contract.task == "question-answering":
        return "an answer is a place in the text, which tokenizers in Python do not tell"
    settings = contract.text
    library = load_python_tokenizer(source, folder)
    if isinstance(library, str):
        return library
    tokenizer = PythonTokenizer(library, folder, settings)
    expected = TextTokenizer(folder, settings, cache_size=0).encode(texts)
    try:
        found = tokenizer.encode(texts)
    except Exception as error:  # as above
        return f"{tokenizer.name} cannot read the texts: {one_line(error)}"
    others = sum(not _same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    return f"{tokenizer.name} gives other ids on {others} of {len(texts)} texts" if others else tokenizer


def _load_legacy(kind: Any, source: Path, folder: Path) -> Any:
    if (source / _VOCABULARY).is_file():
        return kind.from_pretrained(source, local_files_only=True)
    with tempfile.TemporaryDirectory(prefix="hfaccel-vocabulary-") as name:
        place = Path(name)
        ids = open_tokenizer(folder / "tokenizer.json").get_vocab()
        (place / _VOCABULARY).write_text("".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__)), encoding="utf-8")
        for file in (source / item for item in _SETTINGS):
            if file.is_file():
                (place / file.name).write_bytes(file.read_bytes())
        return kind.from_pretrained(place, local_files_only=True)


def _encoded(ids: list[int], type_ids: list[int], special: list[int]) -> Encoded:
    return Encoded(
        ids=np.array(ids, dtype=np.int64),
        type_ids=np.array(type_ids, dtype=np.int64),
        special_tokens_mask=tuple(special),
        offsets=((0, 0),) * len(ids),
        word_ids=(None,) * len(ids),
        sequence_ids=(None,) * len(ids),
    )


def _same(ours: Encoded, theirs: Encoded) -> bool:
    return np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.type_ids, theirs.type_ids)
