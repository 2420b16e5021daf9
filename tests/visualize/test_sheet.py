"""Sheets: every panel whole where it belongs, nothing cut off."""

import numpy as np
import pytest
from PIL import Image

from pmm.visualize.sheet import Group, Panel, sheet

COLOURS = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (200, 160, 30), (30, 160, 160), (160, 30, 160)]


def block(colour, size=(40, 80)):
    return Image.new("RGB", size, colour)


def places(picture, colour):
    found = np.argwhere((np.asarray(picture) == colour).all(axis=2))
    return found.min(axis=0), found.max(axis=0), len(found)


def test_panels_lie_in_rows_and_columns_and_are_whole():
    rows = [[Panel(block(c), "a line") for c in COLOURS[:3]], [Panel(block(c)) for c in COLOURS[3:]]]
    picture = sheet([Group("", ("crop",)), Group("pmm", ("stage I\nfirst", "stage II"))], rows)
    corners = []
    for colour in COLOURS:
        low, high, count = places(picture, colour)
        assert count == 40 * 80
        assert tuple(high - low + 1) == (80, 40)
        corners.append(low)
    tops = [int(y) for y, _ in corners]
    lefts = [int(x) for _, x in corners]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4] == tops[5]
    assert lefts[:3] == lefts[3:]
    assert lefts[0] < lefts[1] < lefts[2]


def test_a_small_picture_and_its_words_stand_beside():
    picture = sheet(
        [Group("", ("a", "b"))],
        [
            [
                Panel(block(COLOURS[0]), "", block(COLOURS[1], (20, 40)), ("taken for", "person 7")),
                Panel(block(COLOURS[2])),
            ]
        ],
    )
    (top, left), (bottom, right), _ = places(picture, COLOURS[0])
    (aside_top, aside_left), (aside_bottom, aside_right), count = places(picture, COLOURS[1])
    assert count == 20 * 40
    assert aside_left > right
    assert aside_bottom == bottom
    words = np.asarray(picture.convert("L"))[top:aside_top, aside_left : places(picture, COLOURS[2])[0][1]]
    assert words.min() < 150
    assert aside_right < places(picture, COLOURS[2])[0][1], "the next column begins after it"
    assert left < aside_left


def test_no_text_is_cut_off():
    long = "a line that is much wider than the crop it belongs to"
    picture = sheet(
        [Group(long, ("a head\nof two lines",)), Group("", (long,))],
        [[Panel(block(COLOURS[0]), long), Panel(block(COLOURS[1]))]],
        notes=[" ".join(["word"] * 60)],
        key=Panel(block(COLOURS[2], (60, 10)), "what the colours are"),
    )
    pixels = np.asarray(picture.convert("L"))
    for edge in (pixels[:, :4], pixels[:, -4:], pixels[:4], pixels[-4:]):
        assert edge.min() == 255
    assert places(picture, COLOURS[2])[2] == 600
    assert (pixels[places(picture, COLOURS[2])[1][0] + 4 :] < 150).any(), "the note stands below the key"


def test_rows_must_fit_their_heads():
    with pytest.raises(ValueError, match=r"rows of 2 panels, got \[1\]"):
        sheet([Group("", ("a", "b"))], [[Panel(block(COLOURS[0]))]])
    with pytest.raises(ValueError, match=r"rows of 1 panels, got \[\]"):
        sheet([Group("", ("a",))], [])
