"""A GGUF file as a source: turned into a checkpoint folder of its own, which everything after it reads like any other.

transformers reads the file: weights, which it dequantizes, config, tokenizer and chat template.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfaccel.artifact.artifact import digest_of, sha256_of
from hfaccel.artifact.cache_space import Hold, locked
from hfaccel.artifact.store import atomic_folder, default_cache_folder, disk_errors
from hfaccel.errors import ExportError, MissingExtraError, SourceError
from hfaccel.source.checks import VOCABULARY_FILES
from hfaccel.source.model import CONFIG_FILE, TOKENIZER_FILES, read_object
from hfaccel.source.weights import PICKLE_FILE, PICKLE_INDEX, SAFETENSORS_FILE, SAFETENSORS_INDEX

SUFFIX = ".gguf"
_REVISION = 1
_MAGIC = b"GGUF"
_GENERATION_FILE = "generation_config.json"
_RECORD_FILE = "record.json"
_OTHER_WEIGHTS = (SAFETENSORS_FILE, SAFETENSORS_INDEX, PICKLE_FILE, PICKLE_INDEX)
_NOT_OF_THE_MODEL = ("dtype", "quantization_config", "_model_name_or_path", "_name_or_path", "name_or_path")
_NOT_OF_THE_TOKENIZER = ("backend", "is_local", "local_files_only")
"""In what transformers makes of such a file: how it came to be loaded."""


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without weights of another kind; None if there is none.

    Raises:
        SourceError: the folder has several, and nothing says which.
    """
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    if any((path / name).is_file() for name in _OTHER_WEIGHTS):
        return None
    found = sorted(item for item in path.iterdir() if item.is_file() and item.suffix.lower() == SUFFIX)
    if len(found) > 1:
        names = ", ".join(item.name for item in found[:4]) + (", ..." if len(found) > 4 else "")
        raise SourceError(
            f"holds {len(found)} GGUF files: {names}",
            where=str(path),
            hint="give the path of one of them; merge the parts of a split one first (llama-gguf-split --merge)",
        )
    return found[0] if found else None


def checkpoint_of_gguf(file: Path, *, beside: bool) -> Path:
    """The checkpoint folder made of a GGUF file, from the cache if it was made before; it lies there as one more result.

    Args:
        file: the GGUF file.
        beside: take ``config.json``, ``generation_config.json`` and the tokenizer that lie beside it, where there are any, instead of what
            the file says.

    Raises:
        MissingExtraError: the package ``gguf`` is not installed.
        SourceError: the file is no whole GGUF file, or has no tokenizer and none lies beside it.
        ExportError: transformers reads no such decoder.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("gguf", extra="gguf", needed_for="reading a GGUF file")
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise SourceError("is not a GGUF file", where=str(file), hint="download it again")
    import transformers

    taken = _files_beside(file) if beside else ()
    hashes = {name: sha256_of(file.parent / name) for name in taken}
    parts = {"gguf": sha256_of(file), "beside": hashes, "transformers": transformers.__version__, "revision": _REVISION}
    key, root = digest_of(parts), default_cache_folder()
    entry = root / "stages" / key
    with disk_errors(root), locked(root):
        Hold(root).add(key)  # for as long as this process runs: several stages read it
    if (entry / _RECORD_FILE).is_file():
        os.utime(entry)
        return entry / "artifact"
    with atomic_folder(entry, replace=True) as temporary:
        folder = temporary / "artifact"
        folder.mkdir()
        _convert(file, folder, taken)
        record = {"record": {"stage": "gguf", "source": str(file)}}
        (temporary / _RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
    return entry / "artifact"


def _files_beside(file: Path) -> tuple[str, ...]:
    """Tokenizer files count only with a vocabulary among them."""
    present = [name for name in TOKENIZER_FILES if (file.parent / name).is_file()]
    if not set(present) & set(VOCABULARY_FILES):
        present = []
    present += [name for name in (CONFIG_FILE, _GENERATION_FILE) if (file.parent / name).is_file()]
    return tuple(present)


def _convert(file: Path, folder: Path, taken: tuple[str, ...]) -> None:
    """Write weights, config and tokenizer; each fails in a way of its own, and the cheap parts come first."""
    from hfaccel.source.torch_model import quiet_transformers

    # Its progress bar asks nobody.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        config = _read_config(file, beside=CONFIG_FILE in taken)
        if not set(taken) & set(VOCABULARY_FILES):
            _write_tokenizer(file, folder)
        _write_model(file, config, folder)
    for name in taken:
        if name != CONFIG_FILE:
            shutil.copyfile(file.parent / name, folder / name)


def _read_config(file: Path, *, beside: bool) -> Any:
    """The config of a decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        found = AutoConfig.from_pretrained(file.parent, **({} if beside else {"gguf_file": file.name}), local_files_only=True)
    except Exception as error:  # readers of configs fail in many ways
        raise ExportError(
            f"transformers reads no GGUF files of architecture '{_architecture(file)}': {_first_line(error)}",
            where=str(file),
            hint="compile the original checkpoint with its safetensors instead",
        ) from error
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise ExportError(
            f"of GGUF files only decoders are read, and '{found.model_type}' is none",
            where=str(file),
            hint="compile the original checkpoint with its safetensors instead",
        )
    return found


def _architecture(file: Path) -> str:
    """As the file names it; takes seconds, because the reader goes through the vocabulary."""
    import gguf

    try:
        return str(gguf.GGUFReader(file).fields["general.architecture"].contents())
    except Exception as error:  # numpy's and its own, of whatever is wrong with the bytes
        raise SourceError(
            f"is damaged or not a whole GGUF file: {_first_line(error)}", where=str(file), hint="download it again"
        ) from error


def _write_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(folder)
    except Exception as error:  # a missing field, a kind of vocabulary that is not known, a missing package
        raise SourceError(
            f"transformers makes no tokenizer of the file: {type(error).__name__}: {_first_line(error)}",
            where=str(file),
            hint="put the tokenizer.json of the original checkpoint into the file's folder, and give the folder",
        ) from error
    path = folder / "tokenizer_config.json"
    settings = {name: value for name, value in read_object(path).items() if name not in _NOT_OF_THE_TOKENIZER}
    # transformers 4 does not know the class that transformers 5 names.
    path.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), encoding="utf-8")


def _write_model(file: Path, config: Any, folder: Path) -> None:
    """Weights in float32, and the config. A model read from GGUF counts as quantized and cannot be saved; one with its weights can."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        dequantized, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # as for the config
        raise SourceError(f"the weights do not load: {_first_line(error)}", where=str(file), hint="download it again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise SourceError(
            f"the file has no weights for {', '.join(missing[:3])}: they would be random",
            where=str(file),
            hint="merge the parts of a split file first (llama-gguf-split --merge)",
        )
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    with torch.device("meta"):
        model = type(dequantized)(type(config)(**settings))
    weights = dequantized.state_dict()
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise SourceError(
            f"config and weights do not fit: {_first_line(error)}",
            where=str(file),
            hint="give the file alone, without its folder",
        ) from error
    model.tie_weights()
    model.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
