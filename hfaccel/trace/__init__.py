"""Decoders traced from their torch module: for architectures whose graph nobody has written down.

Everything but attention and its cache is what torch does. See :mod:`hfaccel.trace.attention` for these two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.artifact.generation import GenerationSettings


def trace_decoder(hf_model: Any, settings: GenerationSettings, *, opset: int) -> onnx_ir.Model:
    """One graph for prompt and single tokens, with ``GroupQueryAttention`` over the cache in every layer.

    Inputs ``input_ids``, ``attention_mask``, ``position_ids`` and the past of each layer; outputs ``logits`` and the present of each.
    Its weights have the names of the parameters, so that they can be told apart later.

    Args:
        hf_model: as transformers loaded it.
        settings: the cache that the graph shall have.
        opset: of ONNX.

    Raises:
        ExportError: the model keeps another state than keys and values, or attends in a way that cannot be traced.
    """
    from hfaccel.trace.decoder import export_decoder
    from hfaccel.trace.tidy import tidy

    model = export_decoder(hf_model, settings, opset=opset)
    parameters = {name: value.detach().numpy() for name, value in hf_model.named_parameters()}
    tidy(model, parameters, positions=settings.context_length)
    return model
