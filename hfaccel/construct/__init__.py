"""Encoder-decoders built from their torch modules, without tracing: one function per family, one row per architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hfaccel.construct.bart import construct_bart
from hfaccel.construct.t5 import construct_t5
from hfaccel.construct.whisper import construct_whisper
from hfaccel.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir

FAMILIES: Mapping[str, Callable[[Any], onnx_ir.Model]] = {
    "bart": construct_bart,
    "blenderbot": construct_bart,
    "m2m_100": construct_bart,
    "marian": construct_bart,
    "mbart": construct_bart,
    "mt5": construct_t5,
    "pegasus": construct_bart,
    "t5": construct_t5,
    "whisper": construct_whisper,
}
"""By ``model_type``."""


def construct_encoder_decoder(hf_model: Any) -> onnx_ir.Model:
    """The graph of encoder and decoder together, float32, with a cache for the decoder's own attention.

    Inputs: ``input_ids`` and ``attention_mask`` [batch, sequence] or ``input_features`` [batch, mel_bins, frames] of the encoder;
    ``decoder_input_ids`` and ``decoder_position_ids`` [batch, decoder_sequence], ``decoder_attention_mask`` [batch, past + new] and the
    past of each layer. Outputs: ``logits`` [batch, decoder_sequence, vocabulary], the present of each layer, and the keys and values that
    the decoder reads of the encoder, ``cross.n.key`` and ``cross.n.value`` [batch, heads, sequence, head_size].

    Args:
        hf_model: a transformers model for conditional generation, in float32.

    Raises:
        ExportError: there is no construction for the architecture, or the config asks for something that it does not have.
    """
    family = FAMILIES.get(str(hf_model.config.model_type))
    if family is None:
        raise ExportError(
            f"encoder-decoders of model_type '{hf_model.config.model_type}' cannot be constructed yet",
            where="export",
            hint=f"architectures that can: {', '.join(FAMILIES)}",
        )
    return family(hf_model)
