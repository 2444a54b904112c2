"""The picture of a benchmark: medians of all contenders, point by point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hfaccel.errors import MissingExtraError, UsageError
from hfaccel.measure.bench import NOT_STABLE, Row

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


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw one panel per mode with a bar (p50, whisker to p95) per contender and point; what was not stable has no bar.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row.mode for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    points = list(dict.fromkeys(row.point for row in rows))
    figure = Figure(figsize=(1.5 + 4.5 * len(modes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    width = 0.8 / len(names)
    for index, mode in enumerate(modes):
        axes = figure.add_subplot(1, len(modes), index + 1)
        for row in (row for row in rows if row.mode == mode):
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
        axes.set_title(mode)
        for rank, name in enumerate(names):
            axes.bar(0, 0, color=f"C{rank}", label=name)
        axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"the picture cannot be written: {error.strerror}", where=str(path)) from error
