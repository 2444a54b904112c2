"""The source in torch, eager mode with SDPA attention: float32, or bfloat16 where a user would cast the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hfaccel.source.torch_model import TorchRunner, load_torch_model

if TYPE_CHECKING:
    from hfaccel.measure.peers.setup import Setup
    from hfaccel.runtime.session import Runner


def float32(setup: Setup) -> tuple[str, Runner]:
    """The module as it is."""
    return "torch fp32", TorchRunner(setup.module)


def bfloat16(setup: Setup) -> tuple[str, Runner]:
    """The module cast to bfloat16; only its answers go back to float32."""
    module = load_torch_model(setup.source, attention=None).to(torch.bfloat16)
    return "torch bf16", TorchRunner(_AnswersInFloat32(module))


class _AnswersInFloat32(torch.nn.Module):
    """numpy has no bfloat16."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.input_names = module.input_names

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        outputs = self.module(input_ids, attention_mask, token_type_ids)
        return {name: value.float() for name, value in outputs.items()}
