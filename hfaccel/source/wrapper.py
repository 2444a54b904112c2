"""The torch module around a transformers model. Imports torch at its top: import it inside functions only."""

from __future__ import annotations

from typing import Any

import torch

from hfaccel.artifact.contract import PoolingMode, Task

_SMALLEST_WEIGHT = 1e-9


class TaskModel(torch.nn.Module):
    """A transformers model that gives a dict of plain tensors, with the pooling of sentence embeddings folded in.

    Attributes:
        hf_model: the transformers model.
        config: its config.
        input_names: names of the inputs it reads, in the order of ``forward``.
        output_names: keys of the dict it gives.
    """

    def __init__(
        self,
        hf_model: Any,
        *,
        task: Task,
        input_names: tuple[str, ...],
        output_names: tuple[str, ...],
        pooling: PoolingMode | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.hf_model = hf_model
        self.config: Any = hf_model.config
        self.task = task
        self.input_names = input_names
        self.output_names = output_names
        self.pooling = pooling
        self.normalize = normalize

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Outputs by name.

        Args:
            input_ids: int64 (batch, sequence).
            attention_mask: int64 (batch, sequence), 1 for tokens and 0 for padding.
            token_type_ids: int64 (batch, sequence); read only when in ``input_names``, as all others.
            input_features: float32 (batch, mel bins, frames), of sound.
            decoder_input_ids: int64 (batch, decoder sequence), of encoder-decoders.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "input_features": input_features,
            "decoder_input_ids": decoder_input_ids,
        }
        read = {name: value for name, value in given.items() if value is not None and name in self.input_names}
        outputs = self.hf_model(**read, return_dict=True)
        if self.pooling is not None:
            assert attention_mask is not None  # encoders read it
            embedding = pool(outputs.last_hidden_state, attention_mask, self.pooling)
            if self.normalize:
                embedding = torch.nn.functional.normalize(embedding, p=2.0, dim=1)
            return {"sentence_embedding": embedding}
        return {name: outputs[name] for name in self.output_names}


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    """One vector per sequence, float32 (batch, hidden), from token vectors (batch, sequence, hidden); padding does not count."""
    hidden = hidden.to(torch.float32)
    mask = attention_mask.to(torch.float32)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(torch.float32).min).amax(dim=1)
    if mode == "last":
        positions = torch.arange(attention_mask.shape[1], device=hidden.device)
        last = (attention_mask * positions).argmax(dim=1)
        return hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
    if mode == "weightedmean":
        # Weights 1, 2, 3, ... over the real tokens, wherever the padding is.
        mask = mask * mask.cumsum(dim=1)
    total = (hidden * mask.unsqueeze(-1)).sum(dim=1)
    weight = mask.sum(dim=1, keepdim=True).clamp(min=_SMALLEST_WEIGHT)
    return total / (weight.sqrt() if mode == "mean_sqrt_len" else weight)
