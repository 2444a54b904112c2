"""What a user of onnxruntime gets without tuning: the exported graph, ``quantize_dynamic``, a session with default options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfaccel.artifact.contract import SessionSettings
from hfaccel.measure.peers.setup import quiet
from hfaccel.runtime.session import GraphSession

if TYPE_CHECKING:
    from hfaccel.measure.peers.setup import Setup
    from hfaccel.runtime.session import Runner


def build(setup: Setup) -> tuple[str, Runner]:
    """The graph prepared and quantized to int8 with the settings that onnxruntime's own guide uses."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, quantized = setup.folder / "prepared.onnx", setup.folder / "quantized.onnx"
    with quiet():
        # The exporter has written all shapes; the symbolic inference would only repeat them.
        quant_pre_process(str(setup.float_graph()), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(str(prepared), str(quantized), weight_type=QuantType.QInt8)
    return "onnxruntime-default int8", GraphSession(quantized, SessionSettings(intra_op_num_threads=setup.threads))
