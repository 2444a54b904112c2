"""Real texts for peers: to compare answers on, and to calibrate with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from hfaccel.measure.contenders import complete

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract
    from hfaccel.runtime.tokenizer import Text

Item = TypeVar("Item")

CALIBRATION_TEXTS = 128
CHECK_TEXTS = 64


def spread(texts: Sequence[Item], count: int) -> tuple[Item, ...]:
    """``count`` texts (or batches of them), or all, spread evenly, so that sorted data is covered."""
    count = min(count, len(texts))
    return tuple(texts[index * len(texts) // count] for index in range(count))


def packaged_texts(contract: Contract) -> tuple[tuple[Text, ...], tuple[Text, ...]]:
    """Texts of the packaged multilingual sample: to check answers on, and others to calibrate with."""
    from hfaccel.evaluate.sample import multilingual_sample

    texts = [complete(str(example.text), contract) for example in multilingual_sample().examples]
    return spread(texts[1::2], CHECK_TEXTS), spread(texts[0::2], CALIBRATION_TEXTS)
