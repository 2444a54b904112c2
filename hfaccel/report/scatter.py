"""The plot of what was tried: speed (or size) against harm, with the budget, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hfaccel.report.facts import Candidate, Manifest, Measure, State, is_float, outcome, speedup, state
from hfaccel.report.labels import CHARACTER_WIDTH, Box, Label, place_labels
from hfaccel.report.markup import Markup, element, join
from hfaccel.report.wording import shortened

LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 30.0, 46.0
LONGEST_LABEL, LONGEST_LABEL_NARROW = 34, 24
CROWD, CROWD_HEIGHT = 8, 14
"""From so many candidates on, each makes a panel so much higher: their names need the room."""
STATE_WORDS: Mapping[State, str] = {"shipped": "ships", "held": "holds all gates", "refused": "refused", "not-built": "not built"}


@dataclass(frozen=True)
class Spot:
    """A candidate on the plot: where, in the units of the axes."""

    name: str
    across: float
    harm: float
    state: State
    words: str


@dataclass(frozen=True)
class Axes:
    """Both scales: data to pixels, and the ticks."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_title: str
    floor: float


def spots_of(manifest: Manifest, measure: Measure) -> tuple[list[Spot], str]:
    """Candidates that have both numbers, and the title of the x axis; where nothing was timed, sizes stand for speed."""
    timed = any(item["timings"] and not is_float(item) for item in manifest["candidates"])
    title = "times as fast as the float graph" if timed else "size in MB (speed was not measured)"
    spots = []
    for item in manifest["candidates"]:
        harm = measure.harm(item)
        across = _across(item, timed)
        if harm is not None and across is not None:
            spots.append(Spot(item["name"], across, harm[1], state(item), outcome(item)))
    return spots, title


def _across(candidate: Candidate, timed: bool) -> float | None:
    if timed:
        return speedup(candidate)
    return candidate["size_bytes"] / 1e6 if candidate["size_bytes"] else None


def scatter(
    spots: Sequence[Spot], measure: Measure, x_title: str, *, width: int, height: int, identifier: str, kind: str
) -> Markup:
    """One panel.

    Args:
        spots: at least one.
        measure: of the y axis.
        x_title: of the x axis.
        width: in pixels.
        height: in pixels, more for many candidates.
        identifier: unique in the page, for the text alternative.
        kind: class of the style sheet, which says on what screens it is shown.
    """
    height += CROWD_HEIGHT * max(0, len(spots) - CROWD)
    longest = LONGEST_LABEL if width > 500 else LONGEST_LABEL_NARROW
    axes = _axes(spots, measure, x_title, width, height)
    budget = axes.y(measure.limit)
    budget_text = f"at most {amount(measure.limit, measure)} allowed"
    frame = Box(LEFT + 2, TOP, width - 2, height - BOTTOM)
    budget_box = Box(LEFT + 4, budget - 17, LEFT + 4 + len(budget_text) * CHARACTER_WIDTH, budget + 2)
    line_box = Box(LEFT, budget - 3, width - RIGHT, budget + 3)
    places = [(axes.x(spot.across), axes.y(max(spot.harm, axes.floor))) for spot in spots]
    labels = place_labels(places, [shortened(spot.name, longest) for spot in spots], frame, [budget_box, line_box])
    told = "; ".join(f"{spot.name}: {spot.across:.2f}, {amount(spot.harm, measure)}, {spot.words}" for spot in spots)
    plain = {"x": LEFT, "width": width - LEFT - RIGHT}
    return element(
        "svg",
        {
            "viewBox": f"0 0 {width} {height}",
            "role": "img",
            "aria-labelledby": f"{identifier}-title {identifier}-desc",
            "class": f"plot {kind}",
            "width": width,
            "height": height,
        },
        element("title", {"id": f"{identifier}-title"}, f"{measure.title} against {x_title}"),
        element("desc", {"id": f"{identifier}-desc"}, f"{budget_text}. {told}. The table below has all numbers."),
        element("rect", {**plain, "y": TOP, "height": max(0.0, budget - TOP), "class": "over"}),
        _grid(axes, measure, width, height),
        element("line", {"x1": LEFT, "x2": width - RIGHT, "y1": budget, "y2": budget, "class": "budget"}),
        element("text", {"x": LEFT + 6, "y": budget - 6, "class": "budget-text"}, budget_text),
        *(_leader(label, place) for label, place in zip(labels, places, strict=True) if label.needs_leader),
        *(_mark(spot, place) for spot, place in zip(spots, places, strict=True)),
        *(_name(label, spot) for label, spot in zip(labels, spots, strict=True)),
    )


def amount(value: float, measure: Measure) -> str:
    """An amount of harm as the axis writes it."""
    if measure.as_percent:
        return f"{value * 100:.3g}%"
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.3g}"


def _axes(spots: Sequence[Spot], measure: Measure, x_title: str, width: int, height: int) -> Axes:
    lowest_shown = measure.limit / 30
    seen = [max(spot.harm, lowest_shown) for spot in spots]
    floor = min(*seen, measure.limit / 10) * 0.8
    ceiling = max(*seen, measure.limit) * 1.9
    y_ticks = [step * 10.0**power for power in range(-9, 2) for step in (1, 2, 5) if floor <= step * 10.0**power <= ceiling]
    lowest, highest = min(spot.across for spot in spots), max(spot.across for spot in spots)
    margin = max(0.12 * (highest - lowest), 0.06 * highest)
    low, high = max(0.0, lowest - margin), highest + margin
    x_ticks = _round_ticks(low, high, most=max(4, width // 85))
    room = height - TOP - BOTTOM
    return Axes(
        x=lambda value: LEFT + (value - low) / (high - low) * (width - LEFT - RIGHT),
        y=lambda value: height - BOTTOM - math.log(value / floor) / math.log(ceiling / floor) * room,
        x_ticks=x_ticks,
        y_ticks=y_ticks if len(y_ticks) <= 9 else [tick for tick in y_ticks if f"{tick:e}"[0] == "1"],
        x_title=x_title,
        floor=floor,
    )


def _round_ticks(low: float, high: float, *, most: int) -> list[float]:
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
    for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0):
        first = math.ceil(low / (step * factor))
        ticks = [index * step * factor for index in range(first, int(high / (step * factor)) + 1)]
        if len(ticks) <= most:
            return ticks
    return [low, high]


def _grid(axes: Axes, measure: Measure, width: int, height: int) -> Markup:
    base = height - BOTTOM
    parts = []
    for tick in axes.y_ticks:
        y = axes.y(tick)
        parts.append(element("line", {"x1": LEFT, "x2": width - RIGHT, "y1": y, "y2": y, "class": "grid"}))
        parts.append(element("text", {"x": LEFT - 6, "y": y + 4, "class": "tick end"}, amount(tick, measure)))
    for tick in axes.x_ticks:
        x = axes.x(tick)
        suffix = "" if "MB" in axes.x_title else "x"
        parts.append(element("line", {"x1": x, "x2": x, "y1": base, "y2": base + 4, "class": "axis"}))
        parts.append(element("text", {"x": x, "y": base + 18, "class": "tick middle"}, f"{tick:.4g}{suffix}"))
    parts.append(element("line", {"x1": LEFT, "x2": width - RIGHT, "y1": base, "y2": base, "class": "axis"}))
    parts.append(element("text", {"x": (LEFT + width - RIGHT) / 2, "y": height - 8, "class": "tick middle"}, axes.x_title))
    title = f"{measure.title}, 95 % bound"
    parts.append(element("text", {"x": 4, "y": 16, "class": "axis-title"}, title))
    return join(parts)


def _leader(label: Label, place: tuple[float, float]) -> Markup:
    x, y = place
    end_x = min(max(x, label.box.left), label.box.right)
    end_y = label.box.bottom if label.box.bottom < y else label.box.top if label.box.top > y else y
    return element("line", {"x1": x, "y1": y, "x2": end_x, "y2": end_y, "class": "leader"})


def _mark(spot: Spot, place: tuple[float, float]) -> Markup:
    x, y = place
    told = element("title", {}, f"{spot.name}: {spot.words}")
    return element("g", {"class": f"mark {spot.state}"}, told, mark_shape(spot.state, x, y))


def mark_shape(kind: State, x: float, y: float) -> Markup:
    """The sign of a state: a filled disc ships, a ring holds all gates, a cross is refused."""
    if kind == "shipped":
        ring = element("circle", {"cx": x, "cy": y, "r": 8.5, "class": "halo"})
        return join([ring, element("circle", {"cx": x, "cy": y, "r": 5.5, "class": "disc"})])
    if kind == "held":
        return element("circle", {"cx": x, "cy": y, "r": 5, "class": "ring"})
    return element("path", {"d": f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10", "class": "cross"})


def _name(label: Label, spot: Spot) -> Markup:
    middle = (label.box.left + label.box.right) / 2
    return element("text", {"x": middle, "y": label.box.bottom - 3, "class": f"label middle {spot.state}"}, label.text)


def legend(states: Sequence[State]) -> Markup:
    """What the signs mean, those that occur."""
    entries = []
    for kind in dict.fromkeys(states):
        sign = element(
            "svg", {"width": 20, "height": 20, "aria-hidden": "true", "class": f"mark {kind}"}, mark_shape(kind, 10, 10)
        )
        entries.append(element("span", {}, sign, STATE_WORDS[kind]))
    return element("p", {"class": "legend"}, *entries)
