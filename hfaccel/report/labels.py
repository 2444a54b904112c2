"""Where to write the names of points so that they overlap neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER_WIDTH = 6.9
"""Pixels per character at 12 pixels, rather too wide than too narrow: the fonts of the reader are not known."""
HEIGHT = 14.0
MARK_RADIUS = 10.0
ROUNDS = 4
_DIRECTIONS = ((1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (0.8, -0.8), (-0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
_DISTANCES = (12.0, 22.0, 36.0, 54.0, 78.0)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Common area in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Label:
    """A placed text: its box, and whether it stands so far off that a line must lead to its point."""

    text: str
    box: Box
    needs_leader: bool


def place_labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str], frame: Box, obstacles: Sequence[Box] = ()
) -> list[Label]:
    """Place one text per point: each in turn takes the cheapest place given all others, a few rounds long.

    Args:
        points: centres of the marks, in pixels.
        texts: same order.
        frame: what no text may leave.
        obstacles: other things not to write over.
    """
    marks = [Box(x - MARK_RADIUS, y - MARK_RADIUS, x + MARK_RADIUS, y + MARK_RADIUS) for x, y in points]
    placed: dict[int, tuple[float, Label]] = {}
    for _ in range(ROUNDS):
        for index, (point, text) in enumerate(zip(points, texts, strict=True)):
            taken = [label.box for other, (_, label) in placed.items() if other != index]
            solid = [*taken, *(mark for other, mark in enumerate(marks) if other != index), *obstacles]
            placed[index] = min(
                ((_cost(label.box, distance, solid, frame), label) for distance, label in _places(point, text)),
                key=lambda found: found[0],
            )
    return [placed[index][1] for index in range(len(points))]


def _places(point: tuple[float, float], text: str) -> list[tuple[float, Label]]:
    width = len(text) * CHARACTER_WIDTH
    found = []
    for distance in _DISTANCES:
        for across, down in _DIRECTIONS:
            x, y = point[0] + across * distance, point[1] + down * (distance + (HEIGHT / 2 if not across else 0))
            left = x if across > 0 else x - width if across < 0 else x - width / 2
            box = Box(left, y - HEIGHT / 2, left + width, y + HEIGHT / 2)
            found.append((distance, Label(text, box, distance > _DISTANCES[0])))
    return found


def _cost(box: Box, distance: float, solid: Sequence[Box], frame: Box) -> float:
    outside = box.area - box.overlap(frame)
    return distance + 5.0 * sum(box.overlap(other) for other in solid) + 50.0 * outside
