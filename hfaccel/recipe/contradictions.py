"""What a rung of the ladder says that its engine or its scheme cannot do."""

from __future__ import annotations

from hfaccel.recipe.schema import SESSION_FIELDS, Rung

_QUANTIZATION_FIELDS = frozenset(Rung.model_fields) - SESSION_FIELDS - {"name", "scheme", "graph", "objectives"}
_WEIGHT_ONLY_FIELDS = frozenset(
    {
        "weight_only_bits",
        "block_size",
        "symmetric",
        "method",
        "eight_bit",
        "eight_bit_matmuls",
        "rotate",
        "split_head",
        "prompt_graph",
        "massive_channels",
    }
)


def contradictions(rung: Rung) -> tuple[tuple[str, str], ...]:
    """Fields that say something which the engine or the scheme of this rung cannot do, each with what is wrong."""
    found = []
    if rung.engine == "onnxruntime" and rung.inference_precision != "f32":
        found.append(("inference_precision", f"onnxruntime cannot compute float graphs in {rung.inference_precision}"))
    if rung.engine != "onnxruntime":
        others = _changed(rung, SESSION_FIELDS - {"engine", "inference_precision", "encoder_engine"})
        found += [(name, f"{rung.engine} has no such setting") for name in others]
    if rung.cache_bits is not None and rung.engine != "onnxruntime":
        found.append(("cache_bits", f"only onnxruntime stores keys and values in integers, {rung.engine} cannot"))
    if rung.scheme == "none":
        found += [(name, "a rung of scheme none quantizes nothing") for name in _changed(rung, _QUANTIZATION_FIELDS)]
    elif rung.scheme == "weight-only":
        found += _of_weight_only(rung)
    else:
        found += _without_blocks(rung)
    found += _beyond_matmuls(rung)
    if rung.encoder_engine != "onnxruntime":
        found += _of_encoder_engine(rung)
    if rung.scheme == "dynamic" and rung.engine != "onnxruntime":
        found.append(("engine", f"only onnxruntime has products with the range of each call, {rung.engine} has none"))
    if rung.scheme == "per-token":
        found += _of_per_token(rung)
    return tuple(found)


def _without_blocks(rung: Rung) -> list[tuple[str, str]]:
    of_blocks = _WEIGHT_ONLY_FIELDS - {"method"} if rung.scheme == "static" else _WEIGHT_ONLY_FIELDS
    found = [(name, f"the scheme {rung.scheme} has no blocks") for name in _changed(rung, of_blocks)]
    if rung.scheme == "static" and rung.method not in ("rtn", "gptq"):
        found.append(("method", f"{rung.method} rounds weights in blocks; static has rtn and gptq"))
    if rung.method == "gptq" and not rung.per_channel:
        found.append(("method", "gptq gives each output channel a scale of its own"))
    return found


def _beyond_matmuls(rung: Rung) -> list[tuple[str, str]]:
    found = []
    if rung.eight_bit_scores and not (rung.portable and rung.graph == "fused"):
        found.append(("eight_bit_scores", "only static on the fused graph in openvino has them"))
    if rung.eight_bit_shares and not rung.eight_bit_scores:
        found.append(("eight_bit_shares", "only attention with eight_bit_scores has them"))
    if rung.eight_bit_convolutions and not rung.portable:
        found.append(("eight_bit_convolutions", "only static in openvino has them"))
    return found


def _of_encoder_engine(rung: Rung) -> list[tuple[str, str]]:
    found = []
    if rung.engine != "onnxruntime":
        found.append(("encoder_engine", f"{rung.engine} runs all of an encoder already"))
    if rung.scheme != "static":
        found.append(("encoder_engine", "only products of the scheme static are stored as another engine reads them"))
    elif not rung.blockwise_decoder:
        found.append(("encoder_engine", "the decoder stays with onnxruntime: give it blocks with blockwise_decoder"))
    return found


def _of_per_token(rung: Rung) -> list[tuple[str, str]]:
    found = []
    if rung.engine != "onnxruntime":
        found.append(("engine", f"only onnxruntime has products with a scale per token, {rung.engine} has none"))
    if not rung.per_channel:
        found.append(("per_channel", "the scheme per-token has a scale per output channel, never one per tensor"))
    if rung.calibration != "minmax":
        found.append(("calibration", "the scheme per-token takes activations as they come and calibrates no ranges"))
    return found


def _of_weight_only(rung: Rung) -> list[tuple[str, str]]:
    found = []
    if rung.blockwise_matmuls:
        found.append(("blockwise_matmuls", "the scheme weight-only stores every MatMul in blocks"))
    if rung.outlier_matmuls:
        found.append(("outlier_matmuls", "the scheme weight-only has a scale for each token and block"))
    if not rung.per_channel:
        found.append(("per_channel", "the scheme weight-only has a scale per block of a channel, never one per tensor"))
    if rung.calibration != "minmax":
        found.append(("calibration", "the scheme weight-only takes activations as they come and calibrates no ranges"))
    if rung.method not in ("rtn", "gptq") and rung.symmetric:
        found.append(("method", f"{rung.method} gives each block a zero point: symmetric must be false"))
    if rung.weight_only_bits == 8:
        found += [(name, "every MatMul has 8 bits") for name in _changed(rung, frozenset({"eight_bit_matmuls", "split_head"}))]
    if rung.prompt_graph and rung.weight_only_bits == 8 and not rung.symmetric:
        found.append(("prompt_graph", "weights of 8 bits serve both graphs, and must have no zero points"))
    return found


def _changed(rung: Rung, names: frozenset[str]) -> list[str]:
    return sorted(name for name in names if getattr(rung, name) != Rung.model_fields[name].default)
