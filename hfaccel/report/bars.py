"""Bars and intervals that live in table cells: SVG in per cent of the cell, so that they fit any screen."""

from __future__ import annotations

from dataclasses import dataclass

from hfaccel.report.markup import Markup, element, join


def bar(share: float, *, kind: str = "bar", reference: float | None = None) -> Markup:
    """A horizontal bar.

    Args:
        share: of the cell's width, 0 to 1.
        kind: class of the style sheet.
        reference: where a thin line marks what the bar is compared with, 0 to 1.
    """
    parts = [element("rect", {"x": 0, "y": 3, "height": 10, "width": _at(share), "rx": 2, "class": kind})]
    if reference is not None:
        parts.append(element("line", {"x1": _at(reference), "x2": _at(reference), "y1": 0, "y2": 16, "class": "reference"}))
    return _cell(16, *parts)


@dataclass(frozen=True)
class Scale:
    """What part of a measure an interval's cell shows: from ``low`` to ``high``, with 0 and the limit marked."""

    low: float
    high: float
    limit: float

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1; what lies outside is put at the edge."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def interval(measured: float, bounds: tuple[float, float], scale: Scale, *, kind: str) -> Markup:
    """A dot for what was measured, a line to its bounds, and the limit; an arrow where a bound lies outside the scale.

    Args:
        measured: the value.
        bounds: the ends of the line; one of them is ``measured`` where only one side is bounded.
        scale: shared by all intervals that are compared.
        kind: class of the style sheet.
    """
    low, high = (_at(scale.share(value)) for value in bounds)
    zero, limit, dot = (_at(scale.share(value)) for value in (0.0, scale.limit, measured))
    parts = [
        element("rect", {"x": limit, "y": 0, "width": _at(1 - scale.share(scale.limit)), "height": 20, "class": "over"}),
        element("line", {"x1": zero, "x2": zero, "y1": 0, "y2": 20, "class": "axis"}),
        element("line", {"x1": limit, "x2": limit, "y1": 0, "y2": 20, "class": "budget"}),
        element("line", {"x1": low, "x2": high, "y1": 10, "y2": 10, "class": f"range {kind}"}),
    ]
    if bounds[1] > scale.high:
        edge = element("path", {"d": "M-10 4l8 6l-8 6z", "class": f"arrow {kind}"})
        parts.append(element("svg", {"x": "100%", "y": 0, "overflow": "visible"}, edge))
    else:
        parts.append(element("line", {"x1": high, "x2": high, "y1": 5, "y2": 15, "class": f"range {kind}"}))
    if scale.low <= measured <= scale.high:
        parts.append(element("circle", {"cx": dot, "cy": 10, "r": 4, "class": f"dot {kind}"}))
    return _cell(20, *parts)


def _cell(height: int, *parts: Markup) -> Markup:
    """Numbers stand in the cells beside it, so that a screen reader needs nothing of the drawing."""
    return element("svg", {"width": "100%", "height": height, "aria-hidden": "true", "class": "cell"}, join(parts))


def _at(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"
