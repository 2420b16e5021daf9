"""The pictures of learnt parts, and of what hurts when it is hidden."""

import numpy as np
import pytest

from pmm.data.windows import Windows
from pmm.visualize.parts import _at_centres, _colour, _painted, occlusion_picture, parts_picture

CROP = np.full((1, 128, 64, 3), 90, np.uint8)


def stripes(count):
    """Each cell of an 8x4 map wholly of its stripe: [1, count, 8, 4]."""
    return np.eye(count)[:, np.repeat(np.arange(count), 8 // count)][None, :, :, None].repeat(4, 3)


def test_a_cell_has_the_colour_of_its_part():
    four, two = (np.asarray(parts_picture(["a"], CROP, stripes(count), 16, height=128)) for count in (4, 2))
    colours = {tuple(pixel) for pixel in four[:, 100:].reshape(-1, 3)}
    assert len(colours) > len({tuple(pixel) for pixel in two[:, 100:].reshape(-1, 3)})
    assert four.shape[1] > two.shape[1]


def test_the_colour_is_that_of_the_part_with_most_of_the_cell():
    share = 0.6 * stripes(4)[0] + 0.1
    painted = np.asarray(_painted(CROP[0], share, 16, (64, 128)))
    for part, rows in enumerate(np.split(painted, 4)):
        assert (rows == rows[0, 0]).all()
        np.testing.assert_allclose(rows[0, 0], 0.45 * 90 + 0.55 * np.array(_colour(part)), atol=1)
    assert len({_colour(part) for part in range(4)}) == 4


def test_a_map_that_reaches_beyond_the_crop_is_cut():
    assert parts_picture(["a"], np.full((1, 100, 50, 3), 90, np.uint8), stripes(4), 16, height=128).height > 128


def test_what_hurts_is_at_the_centre_of_the_window_that_hurts():
    windows = Windows(height=128, width=64, step=10)
    drops = np.zeros((len(windows.tops), len(windows.lefts)))
    drops[2, 1] = 0.5
    shown = _at_centres(drops, windows)
    top, left, bottom, right = windows.rectangles()[2 * len(windows.lefts) + 1]
    row, column = (top + bottom) // 2, (left + right) // 2
    assert shown.shape == (128, 64)
    assert shown[row, column] == pytest.approx(0.5, rel=0.1)
    assert shown[row, column] >= 0.95 * shown.max()
    shown[row - 10 : row + 10, column - 10 : column + 10] = 0
    assert not shown.any()


@pytest.mark.parametrize("step", [1, 9, 40, 60])
def test_windows_of_every_step_fit_the_crop(step):
    windows = Windows(height=128, width=64, step=step)
    shown = _at_centres(np.ones((len(windows.tops), len(windows.lefts))), windows)
    for top, left, bottom, right in windows.rectangles():
        assert shown[(top + bottom) // 2, (left + right) // 2] == 1


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_every_table_can_be_drawn(value):
    windows = Windows(height=128, width=64, step=16)
    drops = np.full((len(windows.tops), len(windows.lefts)), value)
    assert occlusion_picture(["a"], CROP, [0.7], [drops], windows, height=128).height > 128
