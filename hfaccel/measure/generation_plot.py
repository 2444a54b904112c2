"""Pictures of text generation: tokens per second of all engines, and the way to the artifact as a waterfall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.errors import UsageError
from hfaccel.measure.generation_bench import GenerationRow
from hfaccel.measure.ladder import notes
from hfaccel.measure.verdict import NOT_STABLE

if TYPE_CHECKING:
    from hfaccel.measure.answer_bench import AnswerRow
    from hfaccel.measure.ladder import LadderRow, LeftOut

_WRAP_AT = 22


def draw_generation(rows: Sequence[GenerationRow | AnswerRow], path: Path, *, title: str) -> None:
    """Draw a panel for each part that was timed, with a bar of tokens per second for each engine and request.

    What was not stable has no bar.

    Args:
        rows: at least one.
        path: .png or .svg, see :func:`hfaccel.measure.plot.check_plot_path`.
        title: over the picture.

    Raises:
        UsageError: the file cannot be written.
    """
    engines = list(dict.fromkeys(row.engine for row in rows))
    parts = list(dict.fromkeys(row.part for row in rows))
    requests = list(dict.fromkeys(row.request for row in rows))
    figure = _figure(1.5 + 2 * max(4.5, 0.4 * len(engines) * len(requests)), 4.2, title)
    width = 0.8 / len(engines)
    for index, part in enumerate(parts):
        axes = figure.add_subplot(1, len(parts), index + 1)
        for row in (row for row in rows if row.part == part):
            rank = engines.index(row.engine)
            position = requests.index(row.request) + (rank - (len(engines) - 1) / 2) * width
            if row.timing.stable:
                bar = axes.bar(position, row.tokens_per_second, width, color=f"C{rank}")
                axes.bar_label(bar, fmt="%.0f", fontsize=7)
            else:
                axes.text(position, 0.02, NOT_STABLE, rotation=90, ha="center", transform=axes.get_xaxis_transform())
        axes.set_title(part)
        axes.set_xticks(range(len(requests)), [str(request) for request in requests])
        axes.set_xlabel(f"tokens of the {parts[0]} + new ones")
        axes.set_ylabel("tokens per second (median)")
        for rank, name in enumerate(engines):
            axes.bar(0, 0, color=f"C{rank}", label=name)
        axes.legend(frameon=False)
    _save(figure, path)


def draw_ladder(rows: Sequence[LadderRow], path: Path, *, title: str, left_out: Sequence[LeftOut] = ()) -> None:
    """Draw the way as a waterfall: a bar up to the time of each step, and above it, pale, what the step took away.

    The axis of time is logarithmic, so that equal heights are equal factors.

    Args:
        rows: at least one.
        path: .png or .svg, see :func:`hfaccel.measure.plot.check_plot_path`.
        title: over the picture.
        left_out: steps that the way does not have here, told below.

    Raises:
        UsageError: the file cannot be written.
    """
    import textwrap

    figure = _figure(2.0 + 1.7 * len(rows), 5.0, title)
    axes = figure.add_subplot(1, 1, 1)
    times = [row.timing.p50 for row in rows]
    floor = min(times) / 2
    axes.set_yscale("log")
    for position, (row, time_ms) in enumerate(zip(rows, times, strict=True)):
        axes.bar(position, time_ms - floor, 0.7, bottom=floor, color="C0")
        axes.annotate(
            f"{time_ms:,.0f} ms", (position, time_ms), xytext=(0, -10), textcoords="offset points", ha="center", color="w"
        )
        if row.factor is not None:
            before = times[position - 1]
            if before > time_ms:
                axes.bar(position, before - time_ms, 0.7, bottom=time_ms, color="C0", alpha=0.2)
            axes.plot([position - 1.35, position + 0.35], [before, before], color="0.5", linewidth=0.8)
            stable = "" if row.factor.stable else f"\n{NOT_STABLE}"
            top = max(before, time_ms)
            label = f"{row.factor.ratio:.2f}x{stable}"
            axes.annotate(label, (position, top), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom")
    names = [textwrap.fill(f"{row.step} {row.what}{' *' if row.note else ''}", _WRAP_AT) for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(floor, max(times) * 3)  # room for what stands over the highest bar
    axes.set_ylabel(f"milliseconds for {'the request' if rows[0].unit == 'tokens' else 'all texts'} (median)")
    axes.set_xlabel("\n".join([f"{rows[-1].total:.2f}x in all", *notes(rows, left_out)]), fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"the picture cannot be written: {error.strerror}", where=str(path)) from error
