"""The picture of a benchmark: medians of all contenders, point by point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.errors import MissingExtraError, UsageError
from hfaccel.measure.bench import Row
from hfaccel.measure.verdict import NOT_STABLE

if TYPE_CHECKING:
    from hfaccel.measure.stream import StreamRow

_FORMATS = (".png", ".svg")


def check_plot_path(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is timed.

    Raises:
        UsageError: the name ends neither in .png nor in .svg.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"cannot draw '{path.name}'", where="--plot", hint=f"the name must end in {' or '.join(_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", extra="plot", needed_for="bench --plot") from error


def draw(rows: Sequence[Row], path: Path, *, title: str, stream: Sequence[StreamRow] = ()) -> None:
    """Draw one panel per mode with a bar (p50, whisker to p95) per contender and point, and one of the stream.

    What was not stable has no bar.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row.mode for row in rows))
    panels = len(modes) + bool(stream)
    bars = max(len({row.contender for row in rows}) * len({row.point for row in rows}), len(stream))
    figure = Figure(figsize=(1.5 + max(4.5, 0.3 * bars) * panels, max(4.2, 0.3 * len(stream))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for index, mode in enumerate(modes):
        axes = figure.add_subplot(1, panels, index + 1)
        axes.set_title(mode)
        _draw_mode(axes, [row for row in rows if row.mode == mode])
    if stream:
        _draw_stream(figure.add_subplot(1, panels, panels), stream)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"the picture cannot be written: {error.strerror}", where=str(path)) from error


def _draw_mode(axes: Any, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row.contender for row in rows))
    points = list(dict.fromkeys(row.point for row in rows))
    width = 0.8 / len(names)
    for row in rows:
        rank = names.index(row.contender)
        position = points.index(row.point) + (rank - (len(names) - 1) / 2) * width
        if row.timing.stable:
            whisker = [[0.0], [row.timing.p95 - row.timing.p50]]
            axes.bar(position, row.timing.p50, width, yerr=whisker, color=f"C{rank}", capsize=2)
            axes.annotate(f"{row.timing.p50:.1f}", (position, row.timing.p50), ha="center", va="bottom", fontsize=7)
        else:
            axes.text(position, 0.02, NOT_STABLE, rotation=90, ha="center", transform=axes.get_xaxis_transform())
    axes.set_xticks(range(len(points)), [str(point) for point in points])
    axes.set_xlabel("batch x tokens")
    axes.set_ylabel("milliseconds (p50, whisker to p95)")
    for rank, name in enumerate(names):
        axes.bar(0, 0, color=f"C{rank}", label=name)
    axes.legend(frameon=False)


def _draw_stream(axes: Any, rows: Sequence[StreamRow]) -> None:
    engines = list(dict.fromkeys(row.engine for row in rows))
    for position, row in enumerate(rows):
        if row.timing.stable:
            bar = axes.barh(position, row.timing.p50, color=f"C{engines.index(row.engine)}")
            axes.bar_label(bar, fmt="%.0f", fontsize=7, padding=2)
        else:
            axes.text(0.02, position, NOT_STABLE, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [f"{row.engine}, {row.order}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds for the whole stream")
    axes.set_title(f"stream of {rows[0].texts} texts")
