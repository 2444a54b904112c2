"""Second moments of activations, which say what an error in a weight costs: streamed over the calibration texts."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.calibration import Feeds, open_with_outputs

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.quant.massive_channels import MassiveChannels

MOST_BYTES = 250_000_000
"""Of moments held at once: a graph that has more is gone through in several passes, each with the earlier products quantized."""


def second_moments(
    model: onnx_ir.Model,
    names: Sequence[str],
    batches: Sequence[Feeds],
    *,
    workdir: Path,
    massive: Mapping[str, MassiveChannels] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Mean of x x^T over all tokens, float32 [channels, channels], of each named value; padding does not count.

    Args:
        model: it is not changed.
        names: values of shape [batch, sequence, channels], or of fewer tokens where the graph picks some.
        batches: feeds with an ``attention_mask``.
        workdir: where the instrumented graph may lie meanwhile.
        massive: channels of some of the values that count as no larger than ordinary ones.
    """
    session = open_with_outputs(model, names, workdir)
    gc.collect()
    moments: dict[str, np.ndarray] = {}
    tokens = dict.fromkeys(names, 0)
    for feeds in batches:
        mask = feeds["attention_mask"].astype(bool)
        outputs = session.run(feeds)
        for name in names:
            values = outputs[name] if name in outputs else feeds[name]
            rows = values[mask] if values.shape[:2] == mask.shape else values.reshape(-1, values.shape[-1])
            rows = massive[name].clipped(rows) if name in massive else rows
            product = rows.T @ rows
            if name in moments:
                moments[name] += product
            else:
                moments[name] = product
            tokens[name] += len(rows)
    for name, moment in moments.items():
        moment /= max(1, tokens[name])
    return moments


def grouped(widths: Mapping[str, int], most_bytes: int = MOST_BYTES) -> Iterator[list[str]]:
    """The names in order, in groups whose moments [width, width] fit into memory together.

    Args:
        widths: channels by name of the value.
        most_bytes: of the moments of a group.
    """
    group: list[str] = []
    held = 0
    for name, width in widths.items():
        size = 4 * width * width
        if group and held + size > most_bytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
