"""A sheet: rows of crops under the heads of their columns, with words beside, below and at the end. PIL only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from pmm.visualize.style import FAINT, INK, RULE, Colour

HEIGHT = 256
"""Of a crop on a sheet, in pixels, if nothing asks for more."""


class Panel(NamedTuple):
    """One place of a sheet."""

    image: Image.Image
    below: str = ""
    """A line under it."""
    aside: Image.Image | None = None
    """A small picture at its right, with `beside` above."""
    beside: tuple[str, ...] = ()


class Group(NamedTuple):
    """Columns that belong together, under one name ("" for none): the head of each, up to two lines."""

    name: str
    heads: tuple[str, ...]


def sheet(
    groups: Sequence[Group], rows: Sequence[Sequence[Panel]], *, notes: Sequence[str] = (), key: Panel | None = None
) -> Image.Image:
    """Draw `rows`, each a panel per column of `groups`, from left to right.

    `notes` are sentences for the end, wrapped to the width; `key` explains colours there: its image, then its `below`.
    Returns an RGB picture as large as all of it needs. Raises ValueError for no row, or one of another length.
    """
    heads = [head for group in groups for head in group.heads]
    if not rows or any(len(row) != len(heads) for row in rows):
        raise ValueError(f"expected rows of {len(heads)} panels, got {[len(row) for row in rows]}")
    layout = _SheetLayout(groups, rows)
    lines = layout.wrapped(notes)
    height = layout.bottom + round(1.4 * layout.text * len(lines)) + (2 * layout.text if key else 0) + layout.gap
    picture = Image.new("RGB", (layout.width, height), "white")
    pen = _Pen(ImageDraw.Draw(picture), layout.text)
    _draw_heads(pen, layout, groups)
    for y, row in zip(layout.tops, rows, strict=True):
        for x, panel in zip(layout.lefts, row, strict=True):
            _draw_panel(picture, pen, layout, x, y, panel)
    y = layout.bottom
    if key:
        picture.paste(key.image, (layout.gap, y + (layout.text - key.image.height) // 2))
        pen.write(layout.gap + key.image.width + layout.text, y + layout.text // 2, key.below, FAINT)
        y += 2 * layout.text
    for line in lines:
        pen.write(layout.gap, y + layout.text // 2, line, FAINT)
        y += round(1.4 * layout.text)
    return picture


def text_size(height: int) -> int:
    """Font size beside crops of `height` pixels."""
    return max(12, height // 14)


class _SheetLayout:
    """Where things lie, in pixels."""

    def __init__(self, groups: Sequence[Group], rows: Sequence[Sequence[Panel]]) -> None:
        tallest = max(panel.image.height for row in rows for panel in row)
        self.text = text_size(tallest)
        self.gap = max(8, tallest // 14)
        self.font = ImageFont.load_default(self.text)
        named = any(group.name for group in groups)
        deepest = max(head.count("\n") + 1 for group in groups for head in group.heads)
        self.group_line = self.gap + self.text // 2
        self.head_line = self.gap + (round(2.1 * self.text) if named else 0)
        top = self.head_line + round(1.3 * self.text * deepest) + self.gap // 2
        self.lefts: list[int] = []
        self.spans: list[tuple[int, int]] = []
        x = column = 0
        for group in groups:
            x += self.gap if not self.lefts else 2 * self.gap  # groups stand apart
            begin = x
            for head in group.heads:
                self.lefts.append(x)
                x += max(self._wide(head), *(self._width_of(row[column]) for row in rows)) + self.gap
                column += 1
            x = max(x - self.gap, begin + round(self.font.getlength(group.name)))
            self.spans.append((begin, x))
        self.width = x + self.gap
        self.tops: list[int] = []
        for row in rows:
            self.tops.append(top)
            below = round(1.6 * self.text) if any(panel.below for panel in row) else 0
            top += max(panel.image.height for panel in row) + below + self.gap
        self.bottom = top + self.gap // 2

    def aside_width(self, panel: Panel) -> int:
        """Of what stands at the right of its image; 0 for nothing."""
        image = panel.aside.width if panel.aside else 0
        return max([image, *(self._wide(line) for line in panel.beside)])

    def wrapped(self, notes: Sequence[str]) -> list[str]:
        """`notes` in lines that fit the width."""
        lines = []
        for note in notes:
            line = ""
            for word in note.split():
                longer = f"{line} {word}".strip()
                if line and self._wide(longer) > self.width - 2 * self.gap:
                    lines.append(line)
                    longer = word
                line = longer
            lines.append(line)
        return lines

    def _wide(self, text: str) -> int:
        return max(round(self.font.getlength(line) + 0.5) for line in text.split("\n"))

    def _width_of(self, panel: Panel) -> int:
        aside = self.aside_width(panel)
        return max(panel.image.width + (aside + self.gap // 2 if aside else 0), self._wide(panel.below))


class _Pen:
    """Text whose left end is at x, its middle at y."""

    def __init__(self, draw: ImageDraw.ImageDraw, size: int) -> None:
        self.draw, self.font, self.size = draw, ImageFont.load_default(size), size

    def write(self, x: int, y: int, text: str, colour: Colour) -> None:
        self.draw.text((x, y), text, colour, self.font, anchor="lm")


def _draw_heads(pen: _Pen, layout: _SheetLayout, groups: Sequence[Group]) -> None:
    for group, (begin, end) in zip(groups, layout.spans, strict=True):
        if group.name:
            pen.write(begin, layout.group_line, group.name, INK)
            rule = layout.group_line + pen.size
            pen.draw.line((begin, rule, end - 1, rule), RULE, max(1, pen.size // 10))
    for x, head in zip(layout.lefts, (head for group in groups for head in group.heads), strict=True):
        for number, line in enumerate(head.split("\n")):
            y = layout.head_line + round((1.3 * number + 0.5) * pen.size)
            pen.write(x, y, line, FAINT if number else INK)


def _draw_panel(picture: Image.Image, pen: _Pen, layout: _SheetLayout, x: int, y: int, panel: Panel) -> None:
    picture.paste(panel.image, (x, y))
    end = y + panel.image.height
    if panel.below:
        pen.write(x, end + round(0.8 * pen.size), panel.below, INK)
    right = x + panel.image.width + layout.gap // 2
    if panel.aside:
        end -= panel.aside.height
        picture.paste(panel.aside, (right, end))
    for line in reversed(panel.beside):
        end -= round(1.3 * pen.size)
        pen.write(right, end + pen.size // 2, line, FAINT)
