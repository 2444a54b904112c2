"""All that can be found wrong with a checkpoint before any weight is loaded, gathered so that the user sees it at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfaccel.construct import FAMILIES
from hfaccel.errors import SourceError
from hfaccel.source.model import CONFIG_FILE, TOKENIZER_FILES, read_json, read_object
from hfaccel.source.weights import find_weight_problems

_GENERATIVE_SUFFIXES = ("ForConditionalGeneration", "DoubleHeadsModel", "ForSpeechSeq2Seq")
VOCABULARY_FILES = tuple(
    name for name in TOKENIZER_FILES if name.startswith(("tokenizer.json", "vocab.")) or name.endswith(".model")
)
_JSON_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)


def find_problems(folder: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> list[str]:
    """What is wrong with the checkpoint in a folder, one sentence each; empty when it can be compiled.

    Args:
        folder: local checkpoint folder.
        trust_remote_code: the user lets Python code of the checkpoint run.
        allow_pickle: the user lets pickled weights be read.
    """
    if not folder.is_dir():
        return [f"no such folder: {folder}"]
    problems, config = _config_problems(folder)
    problems += _unreadable_files(folder)
    if not trust_remote_code:
        problems += _remote_code_problems(folder, config)
    problems += find_weight_problems(folder, allow_pickle=allow_pickle)
    return problems + _tokenizer_problems(folder, config)


def unsupported_architecture(config: Mapping[str, Any]) -> str | None:
    """Why hfaccel cannot compile this architecture yet, or None when nothing in its config speaks against it."""
    names = [str(name) for name in config.get("architectures") or ()]
    name = names[0] if names else str(config.get("model_type"))
    constructed = str(config.get("model_type")) in FAMILIES
    if config.get("is_encoder_decoder") and not constructed:
        return f"encoder-decoder architecture '{name}' is not supported yet"
    if name.endswith(_GENERATIVE_SUFFIXES) and not constructed:
        return f"generative architecture '{name}' is not supported yet"
    if config.get("quantization_config"):
        method = (
            config["quantization_config"].get("quant_method", "unknown")
            if isinstance(config["quantization_config"], dict)
            else "unknown"
        )
        return f"weights quantized with '{method}' are not supported yet"
    return None


def _config_problems(folder: Path) -> tuple[list[str], dict[str, Any]]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return [f"no {CONFIG_FILE}: not a transformers checkpoint"], {}
    try:
        config = read_json(path)
    except SourceError as error:
        return [f"{CONFIG_FILE} {error.what}"], {}
    if not isinstance(config, dict):
        return [f"{CONFIG_FILE} is not a JSON object"], {}
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        return [f"{CONFIG_FILE} has no model_type: transformers cannot tell the architecture"], config
    return [], config


def _unreadable_files(folder: Path) -> list[str]:
    problems = []
    for name in _JSON_FILES:
        path = folder / name
        if path.is_file():
            try:
                read_json(path)
            except SourceError as error:
                problems.append(f"{name} {error.what}")
    return problems


def _remote_code_problems(folder: Path, config: Mapping[str, Any]) -> list[str]:
    named_by = [CONFIG_FILE] if config.get("auto_map") else []
    try:
        tokenizer_config = read_object(folder / "tokenizer_config.json")
    except SourceError:
        tokenizer_config = {}
    if tokenizer_config.get("auto_map"):
        named_by.append("tokenizer_config.json")
    return [
        f"{name} asks to run Python code of the checkpoint (auto_map): pass --trust-remote-code if you trust where it comes from"
        for name in named_by
    ]


def _tokenizer_problems(folder: Path, config: Mapping[str, Any]) -> list[str]:
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return ["no tokenizer: neither tokenizer.json nor a vocabulary file (vocab.txt, vocab.json, *.model)"]
    name = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "vocab.txt"
    try:
        tokens = count_token_ids(folder)
    except SourceError as error:
        return [f"{name} {error.what}"]
    vocabulary_size = config.get("vocab_size")
    if tokens is not None and isinstance(vocabulary_size, int) and tokens > vocabulary_size:
        return [
            f"{name} has token ids up to {tokens - 1}, but {CONFIG_FILE} says vocab_size {vocabulary_size}: "
            "the tokenizer is of another model"
        ]
    return []


def count_token_ids(folder: Path) -> int | None:
    """The largest token id of the tokenizer plus one; None when its files do not tell without a tokenizer library.

    Raises:
        SourceError: ``tokenizer.json`` cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        path = folder / "vocab.txt"
        return len(path.read_bytes().splitlines()) if path.is_file() else None
    tokenizer = read_object(path)
    try:
        vocabulary = tokenizer["model"].get("vocab", {})
        largest = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values(), default=-1)
        return 1 + max([largest, *(int(token["id"]) for token in tokenizer.get("added_tokens") or ())])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError("is not a tokenizer of the tokenizers library", where=str(path)) from error
