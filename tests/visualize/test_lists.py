"""Ranked lists: the right frame around the right crop, no crop pixel covered but by its mark, legible at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm.utils.errors import InvalidFile
from pmm.visualize.lists import QUERY, RIGHT, UNJUDGED, WRONG, ListLayout, ranked_lists
from tests.refusals import refuses

BLUE = (30, 60, 200)
WHITE = (255, 255, 255)


@pytest.fixture
def crop(tmp_path: Path) -> Path:
    path = tmp_path / "0001_c1s1_000001_00.png"
    Image.new("RGB", (20, 50), BLUE).save(path)
    return path


def frame_colours(picture: Image.Image, layout: ListLayout, line: int, rank: int) -> set[tuple[int, ...]]:
    """All colours within the frame around one crop."""
    x, y = layout.cell(line, rank)
    box = (x - layout.frame, y - layout.frame, x + layout.width + layout.frame, y + layout.height + layout.frame)
    pixels = np.asarray(picture.crop(box))
    edge = np.ones(pixels.shape[:2], bool)
    edge[layout.frame : -layout.frame, layout.frame : -layout.frame] = False
    return {tuple(int(v) for v in pixel) for pixel in np.unique(pixels[edge], axis=0)}


@pytest.mark.parametrize("height", [32, 128, 201])
@pytest.mark.parametrize("titles", [(), ("AP 80 %", "AP 12 %")])
def test_frames_tell_query_right_and_wrong(crop: Path, height: int, titles: tuple[str, ...]) -> None:
    rows = [[(crop, True), (crop, False), (crop, True)], [(crop, False)]]
    picture = ranked_lists([crop, crop], rows, height=height, titles=titles)
    layout = ListLayout(height=height, titled=bool(titles))
    assert picture.mode == "RGB"
    assert picture.size == layout.size(2, 3)
    for line, row in enumerate(rows):
        assert QUERY in frame_colours(picture, layout, line, 0)
        for rank, (_, right) in enumerate(row, start=1):
            # a wrong frame is dashed: its colour and the white between, so that it is told without colour too
            assert frame_colours(picture, layout, line, rank) == ({RIGHT} if right else {WRONG, WHITE})
    assert frame_colours(picture, layout, 1, 2) == {WHITE}, "a shorter list leaves its places empty"


def test_crops_are_whole_but_for_the_mark(crop: Path) -> None:
    picture = ranked_lists([crop], [[(crop, True), (crop, False)]])
    layout = ListLayout(height=128, titled=False)
    assert layout.width == 64
    for rank in (0, 1, 2):
        x, y = layout.cell(0, rank)
        pixels = np.asarray(picture.crop((x, y, x + layout.width, y + layout.height)))
        other = np.argwhere((pixels != BLUE).any(axis=2))
        if rank == 0:
            assert not len(other)
        else:
            assert (other >= [layout.height - layout.mark, layout.width - layout.mark]).all()
            assert (pixels == (RIGHT if rank == 1 else WRONG)).all(axis=2).any()
            badge = pixels[-layout.mark + 3 : -3, -layout.mark + 3 : -3]
            assert (badge.min(axis=2) > 200).any(), "no white tick or cross in the badge"


def test_marks_differ_in_shape() -> None:
    """Tick and cross are told apart in grey, too: the white strokes are not the same pixels."""
    from pmm.visualize.lists import _mark

    strokes = []
    for right in (True, False):
        picture = Image.new("RGB", (40, 40), BLUE)
        _mark(picture, 40, 40, 40, right)
        strokes.append((np.asarray(picture.crop((8, 8, 32, 32))) > 230).all(axis=2))
    assert (strokes[0] != strokes[1]).mean() > 0.15


def test_numbers_titles_and_legend_leave_ink(crop: Path) -> None:
    plain = ranked_lists([crop], [[(crop, True)]])
    titled = ranked_lists([crop], [[(crop, True)]], titles=["AP 80 %"])
    assert titled.height > plain.height
    layout = ListLayout(height=128, titled=True)
    top = np.asarray(titled.crop((0, 0, titled.width, layout.header)).convert("L"))
    title = np.asarray(titled.crop((0, layout.header, titled.width, layout.cell(0, 1)[1] - layout.frame)).convert("L"))
    bottom = np.asarray(titled.crop((0, titled.height - layout.swatch - layout.gap, *titled.size)).convert("L"))
    for strip in (top, title, bottom):
        assert strip.min() < 150
        assert (strip[:, -2:] == 255).all(), "text runs out of the picture"


def test_an_empty_list_is_drawn(crop: Path) -> None:
    assert ranked_lists([crop], [[]]).width >= ListLayout(height=128, titled=False).size(1, 0)[0]


def test_a_list_nobody_judged_has_grey_frames_no_marks_and_numbers_below(crop: Path) -> None:
    layout = ListLayout(height=128, titled=False, captioned=True)
    picture = ranked_lists([crop, crop], [[(crop, None)] * 2] * 2, captions=[["0.12", ""], ["3.45", "6.78"]])
    assert picture.size == layout.size(2, 2)
    pixels = np.asarray(picture)
    for colour in (RIGHT, WRONG):
        assert not (pixels == colour).all(axis=2).any()
    for line, rank, captioned in ((0, 1, True), (0, 2, False), (1, 1, True), (1, 2, True)):
        assert frame_colours(picture, layout, line, rank) == {UNJUDGED}
        x, y = layout.cell(line, rank)
        assert (pixels[y : y + layout.height, x : x + layout.width] == BLUE).all(), "a crop without a mark is whole"
        below = y + layout.height + layout.frame
        strip = pixels[below : below + layout.caption, x - layout.frame : x + layout.width + layout.frame]
        assert (strip.min() < 150) == captioned
    # what the numbers are stands in the legend
    told = ranked_lists([crop], [[(crop, None)]], captions=[["0.12"]], measure="distance")
    silent = ranked_lists([crop], [[(crop, None)]], captions=[["0.12"]])
    assert (np.asarray(told) != np.asarray(silent)).any()


def test_one_judged_crop_brings_back_the_whole_legend(crop: Path) -> None:
    mixed = np.asarray(ranked_lists([crop], [[(crop, None), (crop, True)]]))
    legend = mixed[-ListLayout(height=128, titled=False).swatch - 8 :]
    for colour in (RIGHT, WRONG, UNJUDGED):
        assert (legend == colour).all(axis=2).any()


def test_bad_input(crop: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 queries and 1 rows"):
        ranked_lists([crop, crop], [[]])
    with pytest.raises(ValueError, match="at least one"):
        ranked_lists([], [])
    with pytest.raises(ValueError, match="2 for 1 queries"):
        ranked_lists([crop], [[]], titles=["a", "b"])
    with pytest.raises(ValueError, match="one per crop of every row"):
        ranked_lists([crop], [[(crop, None)]], captions=[["a", "b"]])
    with refuses(InvalidFile, path=tmp_path / "missing.jpg"):
        ranked_lists([crop], [[(tmp_path / "missing.jpg", True)]])
