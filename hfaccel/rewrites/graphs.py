"""Reading and writing of graphs for all stages: one writer, one external data file, stable bytes."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "com.microsoft"
"""Of onnxruntime's own operators."""
GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
PROMPT_DATA_NAME = f"{PROMPT_GRAPH_NAME}.data"
"""Weights that only the graph for prompts reads."""
PROMPT_INTEGERS = "prompt_integers"
"""Begins the names of constants that only the graph for prompts reads."""
_BESIDE = (DATA_NAME, PROMPT_GRAPH_NAME, PROMPT_DATA_NAME)


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


def copy_graph(source: Path, folder: Path) -> None:
    """Copy the graph file ``source``, and its weights and its graph for prompts if they lie beside it, under the standard names."""
    shutil.copyfile(source, folder / GRAPH_NAME)
    for name in _BESIDE:
        if source.with_name(name).is_file():
            shutil.copyfile(source.with_name(name), folder / name)


def link_graph(source: Path, folder: Path) -> None:
    """Like :func:`copy_graph`, without a second copy of the graph file where the file system can link files.

    Weights in a file of their own are copied: ONNX readers refuse such a file with several links as an attack.
    """
    if source.with_name(DATA_NAME).is_file():
        copy_graph(source, folder)
        return
    try:
        (folder / GRAPH_NAME).hardlink_to(source)
    except OSError:
        copy_graph(source, folder)


def graph_bytes(folder: Path) -> int:
    """Size of the graph in a folder, of its weights and of its graph for prompts, under the standard names."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name in (GRAPH_NAME, *_BESIDE))


def operator_counts(model: onnx_ir.Model) -> dict[str, int]:
    """How often each operator occurs, most frequent first; names of other domains carry no prefix."""
    return dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common())


def constant_input(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The first constant that a node reads, or None."""
    return next((value for value in node.inputs if value is not None and value.const_value is not None), None)


def computed_input(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The first value that a node reads and that is no constant, or None."""
    return next((value for value in node.inputs if value is not None and value.const_value is None), None)


def producer_of(value: onnx_ir.Value | None, operator: str) -> onnx_ir.Node | None:
    """The node that gives a value, if it is such an operator of ONNX itself."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and node.domain in ("", "ai.onnx") else None


def only_reader_of(node: onnx_ir.Node | None, operator: str, *, position: int = 0) -> onnx_ir.Node | None:
    """The one that reads what a node gives there, if it is the only one and such an operator."""
    uses = list(node.outputs[0].uses()) if node is not None else []
    if node is None or len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    reader, place = uses[0]
    return reader if reader.op_type == operator and place == position else None


def new_initializer(model: onnx_ir.Model, name: str, array: object) -> onnx_ir.Value:
    """Register a constant; the name must be new in the graph."""
    import numpy as np
    import onnx_ir

    tensor = onnx_ir.tensor(np.require(array, requirements="C"), name=name)  # a scalar stays one
    value = onnx_ir.Value(
        name=name, const_value=tensor, shape=onnx_ir.Shape(list(tensor.shape.numpy())), type=onnx_ir.TensorType(tensor.dtype)
    )
    model.graph.register_initializer(value)
    return value


def shared_initializer(model: onnx_ir.Model, name: str, array: object) -> onnx_ir.Value:
    """The constant of this name; registered if the graph does not have it yet, so equal chains of nodes are known to be equal."""
    known = model.graph.initializers.get(name)
    return known if known is not None else new_initializer(model, name, array)


def shared_integers(model: onnx_ir.Model, prefix: str, *values: int) -> onnx_ir.Value:
    """An int64 vector as a :func:`shared_initializer`, whose name is the prefix and the values."""
    import numpy as np

    return shared_initializer(model, "_".join((prefix, *map(str, values))), np.array(values, dtype=np.int64))


def take_over(node: onnx_ir.Node, value: onnx_ir.Value) -> None:
    """Remove a node of one result; ``value`` is read in its place and gets its name, type and shape."""
    read_instead(node.outputs[0], value)
    assert node.graph is not None  # it is in one
    node.graph.remove(node, safe=True)


def read_instead(before: onnx_ir.Value, value: onnx_ir.Value) -> None:
    """Let all who read ``before`` read ``value``, which gets its name, type and shape; what gives ``before`` stays to be removed."""
    name, value.type, value.shape = before.name, before.type, before.shape
    before.replace_all_uses_with(value, replace_graph_outputs=True)
    before.name, value.name = f"{name}_before", name  # it may be one of the graph's outputs


def _forget_trace(model: onnx_ir.Model) -> None:
    """Drop exporter metadata (stack traces name local paths): the same model must give the same bytes everywhere."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
