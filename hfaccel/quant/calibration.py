"""Streaming statistics of activations: one pass over the calibration texts, memory flat in their number."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zipfile import BadZipFile

import numpy as np

from hfaccel.errors import IntegrityError
from hfaccel.rewrites.graphs import GRAPH_NAME, save_graph
from hfaccel.runtime.session import GraphSession

if TYPE_CHECKING:
    import onnx_ir

BINS = 2048
PERCENTILE = 99.995
STATISTICS_FOLDER = "statistics"
"""Folder, in the artifact of the stage that gathered them, of the statistics of a float graph: one file a graph."""
Feeds = Mapping[str, np.ndarray]
_HELD_BYTES = 100_000_000
"""Of new weights that a graph may be handed to onnxruntime with, in memory; with more it is written down first."""


@dataclass
class ActivationStatistics:
    """Running statistics of one value [batch, sequence, channels]; padding positions do not count.

    Attributes:
        channel_minimum: [channels], smallest value seen (0 at most).
        channel_maximum: [channels], largest value seen (0 at least).
        histogram: counts of magnitudes in ``BINS`` equal bins up to ``histogram_limit``, which doubles as values grow.
        channel_sum: float64 [channels], of all values seen; 0 of none.
        tokens: how many values of a channel were seen, as far as their sum is known.
    """

    channel_minimum: np.ndarray
    channel_maximum: np.ndarray
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    histogram_limit: float = 1.0
    channel_sum: np.ndarray | Literal[0] = 0
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int) -> ActivationStatistics:
        """Nothing seen yet."""
        return cls(np.zeros(channels, dtype=np.float32), np.zeros(channels, dtype=np.float32))

    @property
    def channel_abs_max(self) -> np.ndarray:
        """[channels], largest magnitude seen."""
        return np.asarray(np.maximum(-self.channel_minimum, self.channel_maximum))

    @property
    def channel_mean(self) -> np.ndarray:
        """float32 [channels], mean of the values seen; zero where their sum is not known."""
        return np.asarray(np.zeros_like(self.channel_minimum) + self.channel_sum / max(1, self.tokens), dtype=np.float32)

    def scaled(self, factor: np.ndarray) -> ActivationStatistics:
        """Of the same value times a positive ``factor`` [channels]; without histogram and mean."""
        return ActivationStatistics(self.channel_minimum * factor, self.channel_maximum * factor)

    def shifted(self, offset: np.ndarray) -> ActivationStatistics:
        """Of the same value plus ``offset`` [channels]; without histogram and mean.

        Ranges hold zero, and what zero becomes as well. That is room for texts of another kind, whose mean is another: with the least
        range a BERT of random weights fell from a cosine of 0.9995 to 0.9984.
        """
        return ActivationStatistics(self.channel_minimum + offset, self.channel_maximum + offset)

    def of_channels(self, channels: np.ndarray) -> ActivationStatistics:
        """Of the chosen channels alone; without histogram and mean."""
        return ActivationStatistics(self.channel_minimum[channels], self.channel_maximum[channels])

    def without_channels(self, channels: np.ndarray) -> ActivationStatistics:
        """Of the same value with zeros in these channels; without histogram and mean."""
        minimum, maximum = self.channel_minimum.copy(), self.channel_maximum.copy()
        minimum[channels] = maximum[channels] = 0
        return ActivationStatistics(minimum, maximum)

    def update(self, values: np.ndarray, *, histogram: bool = True) -> None:
        """Take in values [tokens, channels]; the histogram costs most of the time and only percentiles need it."""
        self.channel_minimum = np.minimum(self.channel_minimum, values.min(axis=0))
        self.channel_maximum = np.maximum(self.channel_maximum, values.max(axis=0))
        self.channel_sum = self.channel_sum + values.sum(axis=0, dtype=np.float64)
        self.tokens += len(values)
        if not histogram:
            return
        magnitudes = np.abs(values)
        largest = float(magnitudes.max())
        while largest > self.histogram_limit:
            self.histogram = np.concatenate([self.histogram.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, dtype=np.int64)])
            self.histogram_limit *= 2
        self.histogram += np.histogram(magnitudes, bins=BINS, range=(0.0, self.histogram_limit))[0]

    def range(self, method: Literal["minmax", "percentile"]) -> tuple[float, float]:
        """Range to quantize over, containing 0; ``percentile`` clips magnitudes beyond the 99.995th percentile."""
        minimum, maximum = float(self.channel_minimum.min()), float(self.channel_maximum.max())
        if method == "minmax":
            return minimum, maximum
        share = np.cumsum(self.histogram) / max(1, int(self.histogram.sum()))
        limit = float((np.searchsorted(share, PERCENTILE / 100) + 1) * self.histogram_limit / BINS)
        return max(minimum, -limit), min(maximum, limit)


def observe(
    model: onnx_ir.Model, names: Sequence[str], batches: Iterable[Feeds], *, workdir: Path, histograms: bool = False
) -> dict[str, ActivationStatistics]:
    """Run ``batches`` through the graph and gather statistics of the named values.

    Args:
        model: the float graph; it is not changed.
        names: values of shape [batch, sequence, channels] or [tokens, channels], inputs among them. Of any other shape the smallest and the
            largest of all are right, those of a channel are not.
        batches: feeds; where they have an ``attention_mask``, padding does not count.
        workdir: where the instrumented graph may lie meanwhile.
        histograms: also gather what percentile ranges need.
    """
    session = open_with_outputs(model, names, workdir)
    statistics: dict[str, ActivationStatistics] = {}
    for feeds in batches:
        mask = feeds["attention_mask"].astype(bool) if "attention_mask" in feeds else None
        outputs = session.run(feeds)
        for name in names:
            values = outputs[name] if name in outputs else feeds[name]
            padded = mask is not None and values.shape[:2] == mask.shape
            tokens = values[mask] if padded else values.reshape(-1, values.shape[-1])
            if name not in statistics:
                statistics[name] = ActivationStatistics.empty(tokens.shape[-1])
            statistics[name].update(tokens, histogram=histograms)
    return statistics


def save_statistics(statistics: Mapping[str, ActivationStatistics], path: Path) -> None:
    """Write statistics by activation name as an npz file, bit for bit; its folder is made where it is missing."""
    items = list(statistics.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        np.savez_compressed(
            stream,
            names=np.array(list(statistics), dtype=np.str_),
            channels=np.array([len(item.channel_minimum) for item in items], dtype=np.int64),
            minimum=np.concatenate([np.zeros(0, dtype=np.float32), *(item.channel_minimum for item in items)]),
            maximum=np.concatenate([np.zeros(0, dtype=np.float32), *(item.channel_maximum for item in items)]),
            sums=np.concatenate([np.zeros(0), *(np.zeros(len(item.channel_minimum)) + item.channel_sum for item in items)]),
            tokens=np.array([item.tokens for item in items], dtype=np.int64),
            histograms=np.array([item.histogram for item in items], dtype=np.int64).reshape(-1, BINS),
            limits=np.array([item.histogram_limit for item in items], dtype=np.float64),
        )


def load_statistics(path: Path) -> dict[str, ActivationStatistics]:
    """The inverse of :func:`save_statistics`.

    Raises:
        IntegrityError: the file is not one that it wrote.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ends = np.cumsum(arrays["channels"])[:-1]
            by_channel = (np.split(arrays[field], ends) for field in ("minimum", "maximum", "sums"))
            # np.split makes one empty part of nothing: not strict.
            parts = zip(arrays["names"], arrays["histograms"], arrays["limits"], arrays["tokens"], *by_channel, strict=False)
            return {
                str(name): ActivationStatistics(minimum, maximum, histogram, float(limit), sums, int(tokens))
                for name, histogram, limit, tokens, minimum, maximum, sums in parts
            }
    except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
        raise IntegrityError(
            f"these are no activation statistics: {error}",
            where=str(path),
            hint="clear the cache with: hfaccel cache clear; they are gathered anew then",
        ) from error


def open_with_outputs(model: onnx_ir.Model, names: Sequence[str], workdir: Path) -> GraphSession:
    """Open a copy of the graph that also gives the named values; its weights are read where they lie, as far as they lie in one folder.

    Args:
        model: it is not changed.
        names: of values.
        workdir: where the copy is written if its weights are others than those on disk.
    """
    import onnx_ir

    copy = model.clone()
    wanted, present = set(names), {value.name for value in copy.graph.outputs}
    for node in copy.graph:
        for value in node.outputs:
            if value.name in wanted and value.name not in present:
                copy.graph.outputs.append(value)
    weights = [value.const_value for value in copy.graph.initializers.values() if value.const_value is not None]
    stored = [tensor for tensor in weights if isinstance(tensor, onnx_ir.ExternalTensor)]
    new_bytes = sum(tensor.nbytes for tensor in weights if not isinstance(tensor, onnx_ir.ExternalTensor))
    folders = {Path(tensor.base_dir) for tensor in stored}
    if len(folders) == 1 and new_bytes <= _HELD_BYTES:
        content = onnx_ir.to_proto(copy).SerializeToString()
        return GraphSession(folders.pop() / GRAPH_NAME, content=content)
    workdir.mkdir(parents=True, exist_ok=True)
    return GraphSession(save_graph(copy, workdir))
