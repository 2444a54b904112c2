"""Cut an encoder-decoder's graph in two: what is computed once for a source, and what is computed for every new token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.rewrites.graphs import GRAPH_NAME, load_graph, save_graph

if TYPE_CHECKING:
    import onnx_ir

ENCODER_NAME = "encoder.onnx"
DECODER_NAME = "decoder.onnx"

CROSS = "cross."
"""Begins the names of the keys and values that the decoder reads of the encoder."""
_OWN = "decoder_"


def split_encoder_decoder(model: onnx_ir.Model) -> tuple[onnx_ir.Model, onnx_ir.Model]:
    """The encoder, which gives ``cross.n.key`` and ``cross.n.value``, and the decoder, which reads them.

    The decoder's inputs lose their prefix ``decoder_``; the mask of the source becomes ``encoder_attention_mask``.

    Args:
        model: encoder and decoder in one graph; it is not changed. Weights are shared with it.
    """
    encoder, decoder = model.clone(), model.clone()
    _keep_outputs(encoder, [value for value in encoder.graph.outputs if _crosses(value)])
    crossing = [value for value in decoder.graph.outputs if _crosses(value)]
    _keep_outputs(decoder, [value for value in decoder.graph.outputs if not _crosses(value)], given=crossing)
    for value in decoder.graph.inputs:
        assert value.name is not None  # a graph's inputs have names
        if value.name.startswith(_OWN):
            value.name = value.name.removeprefix(_OWN)
        elif value.name == "attention_mask":
            value.name = "encoder_attention_mask"
    return encoder, decoder


def decoder_nodes(model: onnx_ir.Model) -> frozenset[str]:
    """Names of the nodes that depend on the tokens of the answer; none where the graph is no encoder-decoder."""
    reached = {value for value in model.graph.inputs if (value.name or "").startswith((_OWN, "past_key_values."))}
    if not any((value.name or "").startswith(_OWN) for value in reached):
        return frozenset()
    names = set()
    for node in model.graph:
        if any(value in reached for value in node.inputs if value is not None):
            reached.update(node.outputs)
            names.add(node.name or "")
    return frozenset(names)


def write_parts(graph: Path, folder: Path) -> None:
    """Write ``encoder.onnx`` and ``decoder.onnx`` into a folder, and their weights once, in a file that both read.

    Args:
        graph: of encoder and decoder together.
        folder: to write to.
    """
    import onnx_ir

    whole = save_graph(load_graph(graph), folder)
    encoder, decoder = split_encoder_decoder(load_graph(whole))
    # What lies in the file of weights stays there: the parts refer to it.
    onnx_ir.save(encoder, str(folder / ENCODER_NAME))
    onnx_ir.save(decoder, str(folder / DECODER_NAME))
    (folder / GRAPH_NAME).unlink()


def _crosses(value: onnx_ir.Value) -> bool:
    return (value.name or "").startswith(CROSS)


def _keep_outputs(model: onnx_ir.Model, outputs: list[onnx_ir.Value], given: list[onnx_ir.Value] | None = None) -> None:
    """Leave in the graph what the outputs need; ``given`` values become inputs."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    graph.outputs[:] = outputs
    for value in given or ():
        fresh = onnx_ir.Value(name=value.name, shape=value.shape, type=value.type)
        value.name = f"{value.name}_made"
        value.replace_all_uses_with(fresh)
        graph.inputs.append(fresh)
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
