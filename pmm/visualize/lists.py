"""Pictures of what a model finds: every query beside its gallery in rank order. PIL and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pmm.data.crops import load_crop
from pmm.visualize.style import EMPTY, FAINT, INK, Colour

# A green and a red that stay apart for red-green blind eyes (one is bluish, one orange, their lightness differs).
RIGHT: Colour = (0, 150, 110)
WRONG: Colour = (204, 62, 10)
QUERY = INK
UNJUDGED: Colour = (150, 157, 170)
_SMOOTH = 4  # marks are drawn this many times too large and shrunk: PIL does not smooth lines


@dataclass(frozen=True, kw_only=True)
class ListLayout:
    """Where things lie in the picture of `ranked_lists`; all lengths in pixels, derived from the crop height."""

    height: int
    titled: bool
    captioned: bool = False

    @property
    def width(self) -> int:
        """Of one crop: pedestrian crops are twice as high as wide."""
        return self.height // 2

    @property
    def frame(self) -> int:
        return max(2, self.height // 32)

    @property
    def gap(self) -> int:
        """Between the frames of two crops, and around everything."""
        return max(4, self.height // 16)

    @property
    def text(self) -> int:
        """Font size of titles, rank numbers and legend."""
        return max(9, self.height // 10)

    @property
    def mark(self) -> int:
        """Diameter of a tick or cross."""
        return max(11, self.height // 8)

    @property
    def header(self) -> int:
        return self.gap + round(1.5 * self.text)

    def cell(self, line: int, rank: int) -> tuple[int, int]:
        """Top left corner of the crop (inside its frame) of rank 1, 2, ... in `line`; rank 0 is the query."""
        pitch = self.width + 2 * self.frame + self.gap
        # the query stands apart from its list by three more gaps: it is not a result
        x = self.gap + self.frame + rank * pitch + (3 * self.gap if rank else 0)
        title = 2 * self.text if self.titled else 0
        y = self.header + line * (self.height + 2 * self.frame + self.caption + self.gap + title) + title + self.frame
        return x, y

    @property
    def caption(self) -> int:
        """Room for the line below a crop's frame."""
        return round(1.5 * self.text) if self.captioned else 0

    def size(self, lines: int, ranks: int) -> tuple[int, int]:
        """(width, height) of the whole picture; at least wide enough for the legend."""
        last = self.cell(lines - 1, ranks)
        wide = last[0] + self.width + self.frame + self.gap
        return max(wide, 33 * self.text), last[1] + self.height + self.frame + self.caption + 3 * self.gap + self.swatch

    @property
    def swatch(self) -> int:
        """Side of the little frames in the legend."""
        return 2 * self.text


def ranked_lists(
    queries: Sequence[Path],
    rows: Sequence[Sequence[tuple[Path, bool | None]]],
    *,
    height: int = 128,
    titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    measure: str = "",
) -> Image.Image:
    """One line per query: its crop in a dark double frame, then its gallery crops in rank order.

    `rows[i]` is the list of query i, best first, as (path, is it the same person). Right ones have a green frame and a
    tick, wrong ones a dashed red frame and a cross, those of which it is not known (None) a grey frame. `height` is
    that of a crop in pixels, `titles` one line of text per query, `captions[i]` a short text to stand below each crop
    of row i, `measure` says in the legend what those are. Returns an RGB picture. Raises ValueError if the sequences
    do not match or are empty, UserError if a crop cannot be read.
    """
    if not queries or len(rows) != len(queries):
        raise ValueError(f"expected a row per query and at least one, got {len(queries)} queries and {len(rows)} rows")
    if titles and len(titles) != len(queries):
        raise ValueError(f"expected no titles or one per query, got {len(titles)} for {len(queries)} queries")
    if captions and [len(texts) for texts in captions] != [len(row) for row in rows]:
        raise ValueError("expected no captions or one per crop of every row")
    layout = ListLayout(height=height, titled=bool(titles), captioned=bool(captions))
    ranks = max(len(row) for row in rows)
    picture = Image.new("RGB", layout.size(len(queries), ranks), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(layout.text)
    for rank in range(ranks + 1):
        middle = layout.cell(0, rank)[0] + layout.width // 2
        draw.text((middle, layout.header - layout.text), str(rank or "query"), FAINT, font, anchor="mm")
    for line, (query, row) in enumerate(zip(queries, rows, strict=True)):
        x, y = layout.cell(line, 0)
        if titles:
            draw.text((layout.gap, y - layout.frame - 0.8 * layout.text), titles[line], INK, font, anchor="lm")
        _draw_query(picture, query, x, y, layout)
        for rank, (path, right) in enumerate(row, start=1):
            x, y = layout.cell(line, rank)
            _draw_result(picture, path, right, x, y, layout)
            if captions:
                below = y + height + layout.frame + layout.caption // 2
                draw.text((x + layout.width // 2, below), captions[line][rank - 1], INK, font, anchor="mm")
    verdicts = {right for row in rows for _, right in row}
    # a list without any verdict says nothing of persons; one with some explains all that can occur
    kinds = (None,) if verdicts == {None} else (True, False, None) if None in verdicts else (True, False)
    _legend(picture, layout, font, kinds, measure)
    return picture


def _draw_query(picture: Image.Image, path: Path, x: int, y: int, layout: ListLayout) -> None:
    picture.paste(Image.fromarray(load_crop(path, layout.height, layout.width)), (x, y))
    _query_frame(ImageDraw.Draw(picture), x, y, layout.width, layout.height, layout.frame)


def _draw_result(picture: Image.Image, path: Path, right: bool | None, x: int, y: int, layout: ListLayout) -> None:
    picture.paste(Image.fromarray(load_crop(path, layout.height, layout.width)), (x, y))
    _frame(ImageDraw.Draw(picture), x, y, layout.width, layout.height, layout.frame, right)
    if right is not None:
        _mark(picture, x + layout.width, y + layout.height, layout.mark, right)


def _query_frame(draw: ImageDraw.ImageDraw, x: int, y: int, width: int, height: int, thick: int) -> None:
    """Two thin lines with white between: told from the single frames of the results without colour."""
    thin = max(1, thick // 3)
    for inset in (0, thick - thin):
        outer = thick - inset
        draw.rectangle((x - outer, y - outer, x + width + outer - 1, y + height + outer - 1), None, QUERY, thin)


def _frame(draw: ImageDraw.ImageDraw, x: int, y: int, width: int, height: int, thick: int, right: bool | None) -> None:
    """Around, never over, the crop at (x, y): solid green if right, dashed red with whole corners if wrong; or grey."""
    box = (x - thick, y - thick, x + width + thick - 1, y + height + thick - 1)
    draw.rectangle(box, None, {True: RIGHT, False: WRONG, None: UNJUDGED}[right], thick)
    if right is not False:
        return
    for start, end in _gaps(width, 2 * thick):
        for top in (y - thick, y + height):
            draw.rectangle((x + start, top, x + end - 1, top + thick - 1), "white")
    for start, end in _gaps(height, 2 * thick):
        for left in (x - thick, x + width):
            draw.rectangle((left, y + start, left + thick - 1, y + end - 1), "white")


def _gaps(length: int, dash: int) -> list[tuple[int, int]]:
    """The breaks of a dashed line: (start, end) in pixels, evenly spread, a dash at both ends."""
    count = max(1, (length // dash - 1) // 2)
    return [(round((2 * i + 1) * length / (2 * count + 1)), round((2 * i + 2) * length / (2 * count + 1)))
            for i in range(count)]  # fmt: skip


def _mark(picture: Image.Image, right_edge: int, bottom: int, size: int, right: bool) -> None:
    """A round badge with a tick or a cross whose lower right corner is (right_edge, bottom)."""
    big = size * _SMOOTH
    rim = big // 14  # white, so that a green badge shows on green trousers
    strokes = (
        [[(0.27, 0.53), (0.44, 0.69), (0.73, 0.35)]]
        if right
        else [[(0.33, 0.33), (0.67, 0.67)], [(0.33, 0.67), (0.67, 0.33)]]
    )
    badge = Image.new("RGBA", (big, big), (255, 255, 255, 0))
    pen = ImageDraw.Draw(badge)
    pen.ellipse((0, 0, big - 1, big - 1), "white")
    pen.ellipse((rim, rim, big - 1 - rim, big - 1 - rim), RIGHT if right else WRONG)
    for stroke in strokes:
        pen.line([(u * big, v * big) for u, v in stroke], "white", max(1, big // 7), joint="curve")
    badge = badge.resize((size, size), Image.Resampling.LANCZOS)
    picture.paste(badge, (right_edge - size, bottom - size), badge)


def _legend(
    picture: Image.Image,
    layout: ListLayout,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    kinds: Sequence[bool | None],
    measure: str,
) -> None:
    """The last line: what each kind of frame means, as small empty crops with their words, and what captions are."""
    draw, side, thick = ImageDraw.Draw(picture), layout.swatch - 2 * layout.frame, max(2, layout.frame // 2)
    x, y = layout.gap + layout.frame, picture.height - layout.gap - layout.frame - side
    words = {True: "same person", False: "another person", None: "result"}
    for kind in ("query", *kinds):
        text = kind if isinstance(kind, str) else words[kind]
        draw.rectangle((x, y, x + side - 1, y + side - 1), EMPTY)
        if isinstance(kind, str):
            _query_frame(draw, x, y, side, side, layout.frame)
        else:
            _frame(draw, x, y, side, side, thick, kind)
        if isinstance(kind, bool):
            _mark(picture, x + side, y + side, layout.mark, kind)
        x += side + layout.text
        draw.text((x, y + side // 2), text, FAINT, font, anchor="lm")
        x += round(draw.textlength(text, font)) + 2 * layout.text
    if measure:
        draw.text((x, y + side // 2), f"number below: {measure}", FAINT, font, anchor="lm")


def compared_lists(
    queries: Sequence[Path],
    before: Sequence[Sequence[tuple[Path, bool | None]]],
    after: Sequence[Sequence[tuple[Path, bool | None]]],
    *,
    heads: tuple[str, str],
    titles: Sequence[str] = (),
    height: int = 96,
) -> Image.Image:
    """One line per query: its crop, then two ranked lists side by side, each drawn as by `ranked_lists`.

    `before[i]` and `after[i]` are lists of query i, best first, as (path, is it the same person); `heads` name the two,
    `titles` are one line of text per query. Returns an RGB picture. Raises ValueError if the sequences do not match or
    are empty, UserError if a crop cannot be read.
    """
    if not queries or not len(queries) == len(before) == len(after):
        raise ValueError(f"expected two lists per query: {len(queries)} queries, {len(before)} and {len(after)} lists")
    if titles and len(titles) != len(queries):
        raise ValueError(f"expected no titles or one per query, got {len(titles)} for {len(queries)} queries")
    layout = ListLayout(height=height, titled=bool(titles))
    first, second = (max(len(row) for row in rows) for rows in (before, after))
    apart, top = 4 * layout.gap, 2 * layout.text  # between the two lists; for their names
    wide, high = layout.size(len(queries), first + second)
    picture = Image.new("RGB", (wide + apart, high + top), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(layout.text)

    def corner(line: int, rank: int) -> tuple[int, int]:
        x, y = layout.cell(line, rank)
        return x + (apart if rank > first else 0), y + top

    draw.text((corner(0, 0)[0] + layout.width // 2, top + layout.header - layout.text), "query", FAINT, font, "mm")
    for begin, ranks, head in ((0, first, heads[0]), (first, second, heads[1])):
        if ranks:
            draw.text((corner(0, begin + 1)[0] - layout.frame, layout.gap + layout.text // 2), head, INK, font, "lm")
        for rank in range(1, ranks + 1):
            middle = corner(0, begin + rank)[0] + layout.width // 2
            draw.text((middle, top + layout.header - layout.text), str(rank), FAINT, font, "mm")
    for line, query in enumerate(queries):
        x, y = corner(line, 0)
        if titles:
            draw.text((layout.gap, y - layout.frame - 0.8 * layout.text), titles[line], INK, font, "lm")
        _draw_query(picture, query, x, y, layout)
        for begin, row in ((0, before[line]), (first, after[line])):
            for rank, (path, right) in enumerate(row, start=begin + 1):
                _draw_result(picture, path, right, *corner(line, rank), layout)
    _legend(picture, layout, font, (True, False), "")
    return picture
