"""Reading and writing of graphs for all stages: one writer, one external data file, stable bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"


def load_graph(path: Path) -> onnx_ir.Model:
    """The graph with its weights left in their file (memory-mapped) until read."""
    import onnx_ir

    return onnx_ir.load(str(path))


def save_graph(model: onnx_ir.Model, folder: Path) -> Path:
    """Write ``model.onnx`` and its weights as ``model.onnx.data`` into ``folder``; returns the graph's path."""
    import onnx_ir

    _forget_trace(model)
    path = folder / GRAPH_NAME
    onnx_ir.save(model, str(path), external_data=DATA_NAME)
    return path


def operator_counts(model: onnx_ir.Model) -> dict[str, int]:
    """How often each operator occurs, most frequent first; names of other domains carry no prefix."""
    return dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common())


def structure_digest(model: onnx_ir.Model) -> str:
    """SHA-256 over operators, names and shapes, weights left out: tells whether a rewrite changed anything."""
    digest = hashlib.sha256()
    for node in model.graph.all_nodes():
        names = [value.name if value is not None else "" for value in (*node.inputs, *node.outputs)]
        digest.update(repr((node.domain, node.op_type, names)).encode())
    return digest.hexdigest()


def _forget_trace(model: onnx_ir.Model) -> None:
    """Drop exporter metadata (stack traces name local paths): the same model must give the same bytes everywhere."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
