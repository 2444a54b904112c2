"""The sentence-transformers files of a checkpoint: which pooling, normalization and text settings they ask for.

What hfaccel cannot fold into the graph is refused: a module silently left out would give other vectors than the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfaccel.artifact.contract import PoolingMode
from hfaccel.errors import ExportError, SourceError
from hfaccel.source.model import SentenceTransformers, read_json, read_object

_POOLING_NAMES: dict[str, PoolingMode] = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "max": "max",
    "max_tokens": "max",
    "mean_sqrt_len": "mean_sqrt_len",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "weightedmean_tokens": "weightedmean",
    "last": "last",
    "lasttoken": "last",
    "last_token": "last",
}
# Written under the name of the architecture by early releases of sentence-transformers.
_TEXT_FILES = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_WITHOUT_FILES = SentenceTransformers(pooling="mean", normalize=False, max_length=None, lowercase=False)


def read_sentence_transformers(folder: Path) -> SentenceTransformers:
    """Read ``modules.json`` and what it names.

    A folder without ``modules.json`` gets mean pooling without normalization, as sentence-transformers itself treats it.

    Raises:
        ExportError: a module, pooling mode or default prompt that cannot be compiled yet.
        SourceError: a file is missing or not what it should be.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return _WITHOUT_FILES
    modules = read_json(path)
    if (
        not isinstance(modules, list)
        or not modules
        or not all(isinstance(module, dict) and "type" in module for module in modules)
    ):
        raise SourceError("is not a list of modules", where=str(path), hint="download the file again")
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    _refuse_modules(kinds, modules, path)
    refuse_default_prompt(folder)
    text = _text_file(folder)
    max_length = text.get("max_seq_length")
    return SentenceTransformers(
        pooling=_read_pooling(folder / str(modules[1].get("path", "")) / "config.json"),
        normalize="Normalize" in kinds,
        max_length=int(max_length) if max_length else None,
        lowercase=bool(text.get("do_lower_case", False)),
    )


def _refuse_modules(kinds: list[str], modules: list[dict[str, Any]], path: Path) -> None:
    unsupported = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unsupported:
        raise ExportError(
            f"sentence-transformers module '{unsupported[0]}' is not supported yet",
            where=str(path),
            hint="compile the transformer alone with --task feature-extraction and apply the other modules yourself",
        )
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ExportError(
            f"sentence-transformers modules {' -> '.join(kinds)} are not supported yet",
            where=str(path),
            hint="supported: Transformer -> Pooling, optionally -> Normalize",
        )
    subfolder = str(modules[0].get("path", ""))
    if subfolder not in ("", "."):
        raise ExportError(f"a transformer in the sub folder '{subfolder}' is not supported yet", where=str(path))


def refuse_default_prompt(folder: Path) -> None:
    """Refuse a checkpoint that puts a prompt before every text: the run time would leave it out.

    Raises:
        ExportError: ``config_sentence_transformers.json`` names a default prompt that is not empty.
    """
    path = folder / "config_sentence_transformers.json"
    settings = read_object(path)
    name = settings.get("default_prompt_name")
    if name and (settings.get("prompts") or {}).get(name):
        raise ExportError(
            f"default prompt '{name}' is not supported yet",
            where=str(path),
            hint="set default_prompt_name to null and put the prompt before your texts yourself",
        )


def _text_file(folder: Path) -> dict[str, Any]:
    for name in _TEXT_FILES:
        if (folder / name).is_file():
            return read_object(folder / name)
    return {}


def _read_pooling(path: Path) -> PoolingMode:
    if not path.is_file():
        raise SourceError("is missing, but modules.json names it", where=str(path), hint="download the checkpoint again")
    settings = read_object(path)
    named = settings.get("pooling_mode")
    if named:
        names = [named] if isinstance(named, str) else [str(name) for name in named]
    else:
        prefix = "pooling_mode_"
        names = [key.removeprefix(prefix) for key, value in settings.items() if key.startswith(prefix) and value is True]
    if len(names) != 1:
        raise ExportError(
            f"{len(names)} pooling modes at once ({', '.join(names) or 'none'}) are not supported yet",
            where=str(path),
            hint="compile the transformer alone with --task feature-extraction",
        )
    if names[0] not in _POOLING_NAMES:
        raise ExportError(
            f"pooling mode '{names[0]}' is not supported yet",
            where=str(path),
            hint=f"supported: {', '.join(sorted(set(_POOLING_NAMES.values())))}",
        )
    return _POOLING_NAMES[names[0]]
