"""Peers: the same checkpoint in other engines, each set up as its own documentation advises, one module per engine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

from hfaccel.errors import UsageError

PeerName = Literal["torch", "torch-bf16", "torch-compile", "onnxruntime-default", "openvino", "openvino-int8", "ctranslate2"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)

# Whoever is compared is made from the checkpoint by torch and transformers.
_PACKAGES: dict[PeerName, tuple[str, ...]] = {
    "torch": (),
    "torch-bf16": (),
    "torch-compile": (),
    "onnxruntime-default": ("onnx", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "openvino-int8": ("onnx", "onnxscript", "openvino", "nncf"),
    "ctranslate2": ("ctranslate2",),
}


def parse_peers(text: str) -> tuple[PeerName, ...]:
    """Read names of peers, separated by commas; an empty text is no peer.

    Raises:
        UsageError: a name is not in :data:`PEERS`.
    """
    names: dict[PeerName, None] = {}
    for part in (part.strip().lower() for part in text.split(",")):
        found = next((name for name in PEERS if name == part), None)
        if found is not None:
            names[found] = None
        elif part:
            raise UsageError(f"no peer '{part}' to compare with", where="--against", hint=f"known peers: {', '.join(PEERS)}")
    return tuple(names)


def missing_packages(name: PeerName) -> tuple[str, ...]:
    """Packages that a peer needs and that are not installed, without importing any."""
    return tuple(package for package in ("torch", "transformers", *_PACKAGES[name]) if find_spec(package) is None)
