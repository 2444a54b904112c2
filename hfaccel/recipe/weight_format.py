"""How weights with one scale per channel are stored on a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WeightFormat:
    """How weights with one scale per channel, or one for all, are stored.

    Attributes:
        bits: 7 keeps sums of two u8 x s8 products inside 16 bits, at half the precision.
        sums_in_16_bits: scale weights of 8 bits so that the two of any pair fit as well (:mod:`hfaccel.quant.channel_weight`).
    """

    bits: Literal[7, 8] = 8
    sums_in_16_bits: bool = False

    @property
    def for_saturating_target(self) -> bool:
        """Whether it was chosen because products with signed weights of 8 bits saturate."""
        return self.sums_in_16_bits or self.bits == 7
