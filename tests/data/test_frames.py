"""The boxes of a detector in a frame -> crops: which pixels, in which order of colours, and what is refused."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmm.data import frames
from pmm.data.frames import crop_boxes
from pmm.utils.errors import InvalidInput, InvalidValue
from tests.conftest import examples
from tests.refusals import refuses

HEIGHT, WIDTH = 12, 20
FRAME = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
EDGES = st.floats(-30, 30, allow_nan=False).map(lambda value: round(value, 2)) | st.integers(-30, 30)
WITH_AREA = st.tuples(st.integers(-5, 19), st.integers(-5, 11), *2 * [st.floats(0.01, 30)]).map(
    lambda box: (box[0] + 0.25, box[1], box[0] + 0.25 + box[2], box[1] + box[3])
)


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(frames, "_warned", set())


@examples(300)
@given(boxes=st.lists(WITH_AREA | st.tuples(EDGES, EDGES, EDGES, EDGES), max_size=4) | st.lists(WITH_AREA, max_size=4))
def test_a_crop_is_every_pixel_that_its_box_touches(boxes):
    """Pixel by pixel: column x is the interval from x to x + 1. Other boxes are refused, the first by its number."""

    def touched(low, high, count):
        return [place for place in range(count) if low < place + 1 and place < high]

    empty = [n for n, (x1, y1, x2, y2) in enumerate(boxes) if x2 <= x1 or y2 <= y1]
    inside = [(touched(x1, x2, WIDTH), touched(y1, y2, HEIGHT)) for x1, y1, x2, y2 in boxes]
    bad = empty or [n for n, (columns, rows) in enumerate(inside) if not columns or not rows]
    if bad:
        with refuses(InvalidInput, f"box {bad[0]} ", "no area" if empty else f"{WIDTH}x{HEIGHT}", index=bad[0]):
            crop_boxes(FRAME[..., :3], boxes, colour="rgb")
        return
    for given_as in (boxes, np.array(boxes, np.float64).reshape(-1, 4)):
        crops = crop_boxes(FRAME[..., :3], given_as, colour="rgb")
        assert len(crops) == len(boxes)
        for crop, (columns, rows) in zip(crops, inside, strict=True):
            assert np.array_equal(crop, FRAME[rows][:, columns, :3])


def test_whole_numbers_are_slices():
    (crop,) = crop_boxes(FRAME[..., :3], [[3, 2, 9, 11]], colour="rgb")
    assert np.array_equal(crop, FRAME[2:11, 3:9, :3])
    for kind in (np.int32, np.uint8, np.int64, np.float32):
        (same,) = crop_boxes(FRAME[..., :3], np.array([[3, 2, 9, 11]], kind), colour="rgb")
        assert np.array_equal(same, crop)
    (same,) = crop_boxes(FRAME[..., :3], torch.tensor([[3.0, 2.0, 9.0, 11.0]]), colour="rgb")
    assert np.array_equal(same, crop)
    (one,) = crop_boxes(FRAME[..., :3], [[3.2, 2.4, 3.3, 2.5]], colour="rgb")
    assert np.array_equal(one, FRAME[2:3, 3:4, :3])


@pytest.mark.parametrize(
    ("frame", "colour", "expected"),
    [
        (FRAME[..., :3], "rgb", FRAME[..., :3]),
        (FRAME[..., :3], "bgr", FRAME[..., 2::-1]),
        (FRAME, "rgb", FRAME[..., :3]),
        (FRAME, "bgr", FRAME[..., 2::-1]),
        (FRAME[..., 0], "bgr", FRAME[..., [0, 0, 0]]),
        (FRAME[..., :1], "rgb", FRAME[..., [0, 0, 0]]),
        (np.asfortranarray(FRAME), "bgr", FRAME[..., 2::-1]),
        (torch.from_numpy(FRAME), "bgr", FRAME[..., 2::-1]),
    ],
    ids=["RGB", "BGR", "RGBA", "BGRA", "grey", "grey with a channel", "Fortran", "torch"],
)
def test_every_kind_of_frame_gives_rgb_copies(frame, colour, expected):
    frame = frame.copy() if isinstance(frame, np.ndarray) else frame.clone()
    if isinstance(frame, np.ndarray):
        frame.flags.writeable = False
    crops = crop_boxes(frame, [[0, 0, WIDTH, HEIGHT], [5, 1, 8, 9]], colour=colour)
    assert np.array_equal(crops[0], expected)
    assert np.array_equal(crops[1], expected[1:9, 5:8])
    for crop in crops:
        assert (crop.dtype, crop.flags.c_contiguous, crop.flags.writeable) == (np.uint8, True, True)
        assert not np.shares_memory(crop, frame)


@pytest.mark.parametrize(
    ("boxes", "count", "first"),
    [
        ([[0, 0, WIDTH, HEIGHT], [5, -3, 8, 9], [0, 0, 3, 3], [-1, 1, WIDTH + 1, 2]], 2, 1),
        ([[0, 0, 3, HEIGHT + 0.9], [-0.5, 0, 3, 3]], 0, None),
        ([[0, 0, 3, HEIGHT + 1]], 1, 0),
        ([[-1e300, -9, 1e300, 99]], 1, 0),
        ([[0, 0, WIDTH, HEIGHT]], 0, None),
    ],
)
def test_boxes_partly_outside_are_clipped_and_told_once(boxes, count, first, caplog):
    with caplog.at_level(logging.WARNING, "pmm"):
        crops = crop_boxes(FRAME[..., :3], boxes, colour="rgb")
    assert len(crops) == len(boxes)
    assert all(crop.size and crop.shape[0] <= HEIGHT and crop.shape[1] <= WIDTH for crop in crops)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(count)
    for line in lines:
        assert line.startswith(f"{count} of {len(boxes)} boxes")
        assert line.endswith(f"box {first}")
        assert f"{WIDTH}x{HEIGHT}" in line


def test_a_video_has_one_warning_for_each_size_of_its_frames(caplog):
    with caplog.at_level(logging.WARNING, "pmm"):
        for frame in [FRAME, FRAME, FRAME[:-1], FRAME, FRAME[:-1]]:
            crop_boxes(frame, [[0, 0, 3, HEIGHT + 5]], colour="rgb")
    assert [record.getMessage()[:6] for record in caplog.records] == ["1 of 1"] * 2
    assert f"{WIDTH}x{HEIGHT - 1}" in caplog.records[1].getMessage()


def test_boxes_as_fractions_of_the_frame_are_refused():
    for boxes in ([[0.1, 0.2, 0.5, 0.9]], [[0.1, 0.1, 0.2, 1.2], [0, 0, 1, 1]]):
        with refuses(InvalidInput, expected="pixels", hint="multiply"):
            crop_boxes(np.zeros((480, 640, 3), np.uint8), boxes, colour="rgb")
    crop_boxes(FRAME[:1, :1], [[0, 0, 0.9, 1]], colour="rgb")
    crop_boxes(np.zeros((480, 640, 3), np.uint8), [[0, 0, 1, 1], [0, 0, 1, 2]], colour="rgb")


def test_boxes_of_width_and_height_are_told_how_to_convert():
    with refuses(InvalidInput, index=0, hint="x + width"):
        crop_boxes(FRAME, [[5, 1, 3, 4]], colour="rgb")


@pytest.mark.parametrize("none", [[], (), np.zeros((0, 4)), np.zeros((0, 4), int)])
def test_a_frame_without_boxes_has_no_crops(none):
    assert crop_boxes(FRAME[..., :3], none, colour="bgr") == []


@pytest.mark.parametrize(
    ("box", "fact"),
    [
        ([5, 5, 5, 9], "no area"),
        ([9, 5, 5, 9], "no area"),
        ([5, 9, 9, 9], "no area"),
        ([math.nan, 1, 5, 9], "not finite"),
        ([1, 1, math.inf, 9], "not finite"),
        ([WIDTH, 0, WIDTH + 5, 5], f"outside of the frame of {WIDTH}x{HEIGHT}"),
        ([-5, 0, 0, 5], "outside"),
        ([0, HEIGHT, 5, HEIGHT + 1], "outside"),
        ([0, -9, 5, -1], "outside"),
    ],
)
def test_a_box_that_shows_nothing_is_refused_by_number(box, fact):
    with refuses(InvalidInput, "box 2 ", fact, index=2):
        crop_boxes(FRAME[..., :3], [[0, 0, 5, 5], [1, 1, 2, 2], box, [0, 0, 5, 5], box], colour="rgb")


@pytest.mark.parametrize(
    ("boxes", "facts"),
    [
        ([1, 2, 3, 4], ["[4]"]),
        ([[1, 2, 3]], ["[1, 3]"]),
        ([[1, 2, 3, 4, 0.9, 0]], ["[1, 6]", "boxes[:, :4]"]),
        (np.zeros((1, 2, 4)), ["[1, 2, 4]"]),
        ([[1, 2, 3, 4], [1, 2, 3]], ["no array"]),
        ([["a", 2, 3, 4]], ["<U"]),
        (None, ["object []"]),
        (np.ones((1, 4), bool), ["bool"]),
    ],
)
def test_boxes_of_another_shape_are_refused(boxes, facts):
    with refuses(InvalidInput, "boxes", "[N, 4]", *facts, index=None):
        crop_boxes(FRAME[..., :3], boxes, colour="rgb")


@pytest.mark.parametrize(
    ("frame", "facts"),
    [
        (None, ["the frame is None", "the video ended"]),
        (FRAME / 255, ["float64", "uint8"]),
        (np.zeros((4, 5, 2), np.uint8), ["[4, 5, 2]"]),
        (np.zeros((3, 40, 50), np.uint8), ["[3, 40, 50]", "transpose(1, 2, 0)"]),
        (np.zeros((1, 40, 50, 3), np.uint8), ["[1, 40, 50, 3]"]),
        (np.zeros((0, 50, 3), np.uint8), ["no pixels"]),
        ("frame.jpg", ["<U9"]),
        (Image.new("P", (30, 30)), ["PIL", "convert('RGB')"]),
    ],
)
def test_what_is_no_frame_is_refused(frame, facts):
    with refuses(InvalidInput, "the frame", *facts, index=None):
        crop_boxes(frame, [[0, 0, 1, 1]], colour="bgr")


def test_the_colour_is_never_guessed():
    with pytest.raises(TypeError, match="colour"):
        crop_boxes(FRAME, [[0, 0, 1, 1]])
    with refuses(InvalidValue, "colour", "bgr or rgb", value="BGR"):
        crop_boxes(FRAME, [[0, 0, 1, 1]], colour="BGR")
