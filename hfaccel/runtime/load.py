"""Opens a compiled folder; needs onnxruntime, tokenizers and numpy, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfaccel.artifact.contract import Contract, SessionSettings
from hfaccel.errors import IntegrityError
from hfaccel.runtime.model import Model
from hfaccel.runtime.session import GraphSession
from hfaccel.runtime.tokenizer import TextTokenizer


def load(folder: str | Path) -> Model:
    """The compiled model of a folder that ``hfaccel compile`` made.

    Raises:
        IntegrityError: the folder is no such folder, or a file in it is missing or damaged.
    """
    place = Path(folder)
    manifest_path = place / "manifest.json"
    manifest = _read(manifest_path)
    try:
        contract = Contract.from_json(manifest["contract"])
        settings = SessionSettings.from_json(manifest.get("session", {}))
        graph = str(manifest["graph"])
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the manifest does not describe a model that this version can run: {error}",
            where=str(manifest_path),
            hint="use the hfaccel version that made the folder, or compile the model again",
        ) from error
    if Path(graph).name != graph:
        raise IntegrityError(f"the graph {graph!r} is not a file of the folder", where=str(manifest_path))
    tokenizer = TextTokenizer(place / "tokenizer.json", contract.text)
    return Model(GraphSession(place / graph, settings), tokenizer, contract)


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest: object = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "the folder has no manifest.json" if path.parent.is_dir() else "there is no such folder"
        raise IntegrityError(what, where=str(path.parent), hint="make it with: hfaccel compile MODEL -o OUT") from None
    except (ValueError, OSError) as error:
        raise IntegrityError(
            f"the manifest cannot be read: {error}", where=str(path), hint="copy the folder again, or compile it again"
        ) from error
    if not isinstance(manifest, dict):
        raise IntegrityError("the manifest is not a JSON object", where=str(path), hint="compile the model again")
    return manifest
