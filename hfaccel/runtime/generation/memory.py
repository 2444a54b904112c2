"""What an encoder has said of its sources: the keys and values that every step of the decoder attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime


class Memory:
    """Inputs of the decoder that stay the same from step to step. Made by ``EncoderDecoder.encode``; never changed.

    Args:
        values: the ``onnxruntime.OrtValue`` of each input; the first axis is the batch.
        origins: for each row the source that it is of; None where the rows are the sources in their order.

    Attributes:
        batch: rows.
        origins: for each row the index of the source that it is of. Two rows of one source hold the same numbers.
    """

    def __init__(self, values: Mapping[str, Any], origins: Sequence[int] | None = None) -> None:
        self._values = dict(values)
        self.batch = int(next(iter(self._values.values())).shape()[0])
        self.origins = tuple(range(self.batch)) if origins is None else tuple(origins)

    def select(self, rows: Sequence[int]) -> Memory:
        """The memory of these rows in this order; a row may come more than once.

        It is the very same one where no row would be of another source than before: beams of one source trade places freely.
        """
        origins = tuple(self.origins[row] for row in rows)
        if origins == self.origins:
            return self
        return Memory({name: _take(value, list(rows)) for name, value in self._values.items()}, origins)

    def bind(self, binding: Any) -> None:
        """Bind every input; nothing is copied."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of the inputs by name, for those who look into them."""
        # Copies, because an array on the memory of an OrtValue does not keep it.
        return {name: value.numpy().copy() for name, value in self._values.items()}


def _take(value: Any, rows: list[int]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[rows]))
