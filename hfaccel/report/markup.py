"""HTML and SVG as text in which nothing stays unescaped by accident."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

VOID = frozenset({"meta", "br"})


class Markup(str):
    """Text that is HTML already; every other text is escaped where it enters an element."""

    __slots__ = ()


def element(name: str, attributes: Mapping[str, object], *children: str) -> Markup:
    """An element.

    Args:
        name: of the element; HTML's, or SVG's.
        attributes: values are escaped; those that are None are left out, floats are cut to what a screen can show.
        children: kept as they are if they are :class:`Markup`, escaped otherwise.
    """
    shown = "".join(f' {key}="{escape(_text(value))}"' for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{shown}>" if name in VOID else f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[str], separator: str = "") -> Markup:
    """Parts one after the other, those that are no :class:`Markup` escaped."""
    return Markup(separator.join(part if isinstance(part, Markup) else escape(part) for part in parts))


def paragraph(*children: str, kind: str | None = None) -> Markup:
    """A paragraph, of a class of the style sheet if one is given."""
    return element("p", {"class": kind}, *children)


def nowrap(text: str) -> Markup:
    """Text that stays on one line."""
    return element("span", {"class": "nowrap"}, text)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, row_classes: Sequence[str | None] | None = None
) -> Markup:
    """A table in a box of its own that scrolls sideways where the screen is narrow; the first cell of a row names it.

    Args:
        header: of the columns.
        rows: cells, text or :class:`Markup`.
        caption: what the table shows.
        row_classes: of the style sheet, per row.
    """
    head = element("tr", {}, *(element("th", {"scope": "col"}, cell) for cell in header))
    classes = row_classes or [None] * len(rows)
    body = [
        element("tr", {"class": kind}, element("th", {"scope": "row"}, row[0]), *(element("td", {}, cell) for cell in row[1:]))
        for row, kind in zip(rows, classes, strict=True)
    ]
    whole = element(
        "table", {}, element("caption", {}, element("span", {}, caption)), element("thead", {}, head), element("tbody", {}, *body)
    )
    return element("div", {"class": "scroll", "tabindex": 0, "role": "region", "aria-label": caption}, whole)


def _text(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
