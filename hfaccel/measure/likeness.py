"""Whether an engine answers as the source does: a fast engine with other answers must be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import Text

_BATCH = 8


@dataclass(frozen=True)
class Likeness:
    """Agreement with the source in torch float32, over some texts.

    Attributes:
        cosine: mean cosine of the raw outputs.
        same_top: share of equal decisions (top labels); None for tasks that answer with vectors.
        finite: whether every number of every answer is finite.
        texts: how many texts were compared.
    """

    cosine: float
    same_top: float | None
    finite: bool
    texts: int

    def cell(self) -> str:
        """As tables show it."""
        if not self.finite:
            return "not finite"
        return f"{self.cosine:.4f}" if self.same_top is None else f"{self.cosine:.4f}, top-1 {self.same_top:.1%}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"cosine": self.cosine, "top1_agreement": self.same_top, "finite": self.finite, "texts": self.texts}


def likeness_to(reference: Sequence[dict[str, Any]], model: Model, texts: Sequence[Text]) -> Likeness:
    """Compare a model with what the source gave for the same texts.

    Args:
        reference: what :func:`raw_outputs` gave for the source.
        model: what to compare.
        texts: at least one.

    Raises:
        ValueError: the outputs have other shapes than the source's.
    """
    from hfaccel.evaluate.agreement import compare_outputs

    contract = model.contract
    agreement = compare_outputs(contract.task, reference, raw_outputs(model, texts), problem_type=contract.problem_type)
    return Likeness(
        cosine=float(agreement.cosine.mean()),
        same_top=None if agreement.top1 is None else float(agreement.top1.mean()),
        finite=agreement.non_finite == 0,
        texts=len(texts),
    )


def raw_outputs(model: Model, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """Raw outputs of each text, copied: engines may use the memory of their answers again."""
    outputs = model.outputs(model.tokenizer.encode(texts), max_batch=_BATCH)
    return [{name: array.copy() for name, array in output.items()} for output in outputs]
