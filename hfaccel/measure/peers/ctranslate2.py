"""The transformer's body in CTranslate2 (int8), its head in torch: the way that CTranslate2's guide shows for encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hfaccel.errors import ExportError
from hfaccel.measure.peers.ctranslate2_library import load_ctranslate2
from hfaccel.measure.peers.setup import quiet
from hfaccel.source.torch_model import TorchRunner, load_torch_model

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.measure.peers.setup import Setup
    from hfaccel.runtime.session import Runner

_HEADLESS_TASKS = ("feature-extraction", "sentence-similarity")


def build(setup: Setup) -> tuple[str, Runner]:
    """Convert the body to int8 and put it in the place of torch's.

    Raises:
        ExportError: CTranslate2 has no converter for the architecture, or none that keeps its answers.
    """
    ctranslate2 = load_ctranslate2()

    if setup.artifact.contract.text.padding_side == "left":
        raise ExportError("not supported by ctranslate2: encoders that pad on the left")
    folder = setup.folder / "ctranslate2"
    _convert(setup, folder)
    encoder = ctranslate2.Encoder(str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=setup.threads)
    module: Any = load_torch_model(setup.source, attention=None)
    body = _Body(encoder, ctranslate2.StorageView.from_array)
    if setup.source.task in _HEADLESS_TASKS:
        body.config = module.config
        module.hf_model = body
    else:
        setattr(module.hf_model, module.hf_model.base_model_prefix, body)
    return "ctranslate2 int8", TorchRunner(module)


def _convert(setup: Setup, folder: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        """transformers 5 knows absolute positions only and dropped the setting that the converter asks for."""

        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            config = options["config"]
            if not hasattr(config, "position_embedding_type"):
                config.position_embedding_type = "absolute"
            return super().load_model(model_class, model_name_or_path, **options)

    try:
        with quiet():
            source = setup.source
            Converter(str(source.folder), trust_remote_code=source.trust_remote_code).convert(str(folder), quantization="int8")
    except Exception as error:  # converters fail with whatever the missing piece raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(" (supported")[0]
        raise ExportError(f"not supported by ctranslate2: {reason}") from error


class _Body(torch.nn.Module):
    """Token vectors and pooled vector of padded batches, computed by CTranslate2 without the padding."""

    def __init__(self, encoder: Any, view: Callable[[np.ndarray], Any]) -> None:
        super().__init__()
        self._encoder = encoder
        self._view = view
        self.config: Any = None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        **_unused: Any,  # heads also hand on position_ids, inputs_embeds, return_dict: always their defaults here
    ) -> BaseModelOutputWithPooling:
        ids = np.ascontiguousarray(input_ids.numpy(), dtype=np.int32)
        lengths = attention_mask.numpy().sum(axis=1, dtype=np.int32)
        # Zeros are what the encoder takes by itself, and lists of them cost time.
        types = token_type_ids.tolist() if token_type_ids is not None and bool(token_type_ids.any()) else None
        output = self._encoder.forward_batch(self._view(ids), self._view(lengths), types)
        hidden = torch.from_numpy(np.array(output.last_hidden_state))
        pooled = None if output.pooler_output is None else torch.from_numpy(np.array(output.pooler_output))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)
