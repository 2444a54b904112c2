"""How a cross-encoder checkpoint wants the score of a pair made: the activation that sentence-transformers stores with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfaccel.artifact.contract import Activation
from hfaccel.errors import ExportError, SourceError
from hfaccel.source.model import CONFIG_FILE, read_json, read_object
from hfaccel.source.sentence_transformers import refuse_default_prompt

_SETTINGS_FILE = "config_sentence_transformers.json"
# By class name: its module differs between releases of torch (torch.nn.modules.linear.Identity, torch.nn.Identity).
_ACTIVATIONS: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity"}


def read_activation(config: Mapping[str, Any], folder: Path) -> Activation:
    """The activation of a cross encoder with one value for a pair; the sigmoid where the checkpoint names none.

    Args:
        config: content of ``config.json``.
        folder: checkpoint folder.

    Raises:
        SourceError: the checkpoint names an activation that the run time does not have.
        ExportError: the checkpoint puts a prompt before every text, or more modules than the transformer make its score.
    """
    _refuse_modules(folder / "modules.json")
    refuse_default_prompt(folder)
    named, file = _named_activation(config, folder)
    if named is None:
        return "sigmoid"
    module, _, name = named.rpartition(".")
    if module.split(".")[0] != "torch" or name not in _ACTIVATIONS:
        raise SourceError(
            f"the activation '{named}' of the cross encoder is not supported",
            where=str(folder / file),
            hint="supported: torch.nn.Sigmoid and torch.nn.Identity; with Identity the raw scores rank alike if yours is monotonic",
        )
    return _ACTIVATIONS[name]


def _refuse_modules(path: Path) -> None:
    modules = read_json(path) if path.is_file() else []
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules if isinstance(module, dict)]
    if kinds[1:]:
        raise ExportError(
            f"cross-encoder modules {' -> '.join(kinds)} are not supported yet",
            where=str(path),
            hint="supported: a Transformer alone, with a sequence classification head of one label",
        )


def _named_activation(config: Mapping[str, Any], folder: Path) -> tuple[str | None, str]:
    """The stated activation and the file that states it, newest place first, as sentence-transformers looks for it."""
    nested = config.get("sentence_transformers")
    places = (
        (read_object(folder / _SETTINGS_FILE).get("activation_fn"), _SETTINGS_FILE),
        (nested.get("activation_fn") if isinstance(nested, dict) else None, CONFIG_FILE),
        (config.get("sbert_ce_default_activation_function"), CONFIG_FILE),
    )
    return next(((str(named), file) for named, file in places if named), (None, CONFIG_FILE))
