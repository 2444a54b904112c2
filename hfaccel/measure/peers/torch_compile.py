"""The source through ``torch.compile``, compiled for any shape, as its documentation advises where sizes change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfaccel.source.torch_model import TorchRunner

if TYPE_CHECKING:
    from hfaccel.measure.peers.setup import Setup
    from hfaccel.runtime.session import Runner


def build(setup: Setup) -> tuple[str, Runner]:
    """The compiled module; the first run of a new kind of shape compiles, and runs that are timed come later."""
    compiled: Any = torch.compile(setup.module, dynamic=True)
    return "torch-compile fp32", TorchRunner(compiled)
