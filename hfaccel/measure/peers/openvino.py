"""The checkpoint in OpenVINO with its latency hint, as it is or quantized by NNCF.

It is converted from torch, as optimum-intel does it: attention stays one operator, which OpenVINO runs up to four times as fast as the
same attention read from an ONNX file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfaccel.measure.peers.setup import quiet, sample_feeds
from hfaccel.runtime.batching import pad

if TYPE_CHECKING:
    import numpy as np

    from hfaccel.measure.peers.setup import Setup
    from hfaccel.runtime.session import Runner


def float_model(setup: Setup) -> tuple[str, Runner]:
    """In the precision that OpenVINO chooses: bfloat16 where the CPU has it."""
    runner = _Session(_convert(setup), setup)
    return f"openvino {runner.precision}", runner


def int8(setup: Setup) -> tuple[str, Runner]:
    """After NNCF's post-training quantization for transformers, calibrated with real texts."""
    os.environ.setdefault("NNCF_CI", "1")  # nncf reports its use over the network unless it believes to be in CI
    import nncf

    settings = setup.artifact.contract.text
    feeds = [pad([item], settings) for item in setup.artifact.tokenizer.encode(setup.calibration)]
    model = _convert(setup)
    with quiet():
        names: list[str] = [value.get_any_name() for value in model.inputs]
        calibration = nncf.Dataset(feeds, lambda item: {name: item[name] for name in names})
        quantized = nncf.quantize(model, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
    runner = _Session(quantized, setup)
    return f"openvino int8+{runner.precision}", runner


def _convert(setup: Setup) -> Any:
    import openvino

    with quiet():
        model = openvino.convert_model(setup.module, example_input=sample_feeds(setup.module, setup.artifact))
    for port, spec in zip(model.outputs, setup.artifact.contract.outputs, strict=True):
        port.get_tensor().set_names({spec.name})
    return model


class _Session:
    """A compiled OpenVINO model; ``precision`` is that of the operators that are not quantized."""

    def __init__(self, model: Any, setup: Setup) -> None:
        import openvino
        from openvino.properties import hint, inference_num_threads

        options = {hint.performance_mode: hint.PerformanceMode.LATENCY, inference_num_threads: setup.threads}
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self.input_names: tuple[str, ...] = tuple(value.get_any_name() for value in compiled.inputs)
        self.precision = {"bf16": "bf16", "f16": "fp16"}.get(compiled.get_property(hint.inference_precision).to_string(), "fp32")
        self._output_names = [value.get_any_name() for value in compiled.outputs]
        self._request = compiled.create_infer_request()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for one padded batch, in memory of their own."""
        results = self._request.infer({name: feeds[name] for name in self.input_names}, share_inputs=True)
        return {name: results[index] for index, name in enumerate(self._output_names)}
