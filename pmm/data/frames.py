"""A frame of a video and the boxes of a detector -> crops. Loads no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pmm.data.crops import check_pixels
from pmm.data.preprocessing import Crops
from pmm.utils.errors import InvalidInput, InvalidValue, reason_of

Boxes: TypeAlias = npt.NDArray[Any] | Sequence[Sequence[float]]
"""[N, 4]: x1, y1, x2, y2 in pixels."""
CHANNELS = {"bgr": (2, 1, 0), "rgb": (0, 1, 2)}
"""Where red, green and blue are."""
FRACTIONS, FRAME_SIDE = 2, 64
"""Boxes that reach no further than 2 pixels are fractions of a frame, if it is no toy: nobody detects such people."""
_warned: set[tuple[int, int]] = set()
"""Sizes of frames that this process has warned of: a video has thousands of frames like the first."""


def crop_boxes(frame: npt.NDArray[np.uint8], boxes: Boxes, *, colour: Literal["bgr", "rgb"]) -> list[Crops]:
    """The parts of `frame` inside `boxes`, each uint8 RGB [h, w, 3]: what a runner takes as a list.

    The crops are copies: a decoder may write its next frame into the same memory, and no crop keeps its frame alive.

    Args:
        frame: uint8 [H, W, 3], grey [H, W] or [H, W, 1], or [H, W, 4], whose alpha is dropped; any strides.
        boxes: [N, 4] of x1, y1, x2, y2 in pixels, integers or floats; none at all is no crops. A crop is every pixel
            that its box touches: from floor(x1) and floor(y1) up to ceil(x2) and ceil(y2), which it leaves out, so
            [10, 20, 50, 100] is 40 pixels wide and 80 high. What is outside of the frame is cut off; the first time
            that a frame of this size loses a pixel or more of a box, a warning (logger "pmm") says of how many boxes.
        colour: of the frame: "bgr" from OpenCV, "rgb" from PIL, torchvision, PyAV or imageio. There is no default: a
            guess would swap red and blue in silence, and the embeddings would only be a little worse.

    Raises:
        InvalidInput: a frame that is None (the video ended) or of another type or shape; boxes of another shape; or the
            first box that is not finite, has x2 <= x1 or y2 <= y1, or lies outside of the frame (its `index`); or boxes
            that can only be fractions of the frame.
        InvalidValue: another colour.

    Examples:
        >>> frame = np.zeros((480, 640, 3), np.uint8)
        >>> crops = pmm.crop_boxes(frame, [[10, 20, 50, 100], [300.5, 40.2, 360, 200]], colour="bgr")
        >>> [crop.shape for crop in crops]
        [(80, 40, 3), (160, 60, 3)]
    """
    if colour not in CHANNELS:
        raise InvalidValue("colour", colour, choices=CHANNELS)
    pixels = check_pixels(frame, "the frame")
    corners = _whole_pixels(_check_boxes(boxes), *pixels.shape[:2])
    return [_to_rgb(pixels[top:bottom, left:right], colour) for left, top, right, bottom in corners.tolist()]


def _check_boxes(boxes: Boxes) -> npt.NDArray[np.float64]:
    """[N, 4], finite, each with an area. Raises InvalidInput."""
    try:
        numbers = np.asarray(boxes)
    except Exception as error:  # ragged lists, arrays on a GPU
        raise InvalidInput(f"the boxes are no array of numpy ({reason_of(error)})", expected="[N, 4]") from error
    if numbers.shape == (0,):
        numbers = numbers.reshape(0, 4)
    if numbers.ndim != 2 or numbers.shape[1] != 4 or numbers.dtype.kind not in "iuf":
        wider = numbers.ndim == 2 and numbers.shape[1] > 4
        raise InvalidInput(
            f"the boxes are {numbers.dtype} {list(numbers.shape)}",
            expected="numbers [N, 4]: x1, y1, x2, y2",
            hint="leave out scores and classes: boxes[:, :4]" if wider else "",
        )
    numbers = numbers.astype(np.float64)
    finite = np.isfinite(numbers).all(1)
    _refuse(~finite, numbers, "is not finite", "numbers without NaN and Inf")
    no_area = (numbers[:, 2:] <= numbers[:, :2]).any(1)
    _refuse(no_area, numbers, "has no area", "x1 < x2 and y1 < y2", "of x, y, width and height, x2 is x + width")
    return numbers


def _whole_pixels(boxes: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.int64]:
    """The pixels [N, 4] that `boxes` touch within a frame: left, top, right and bottom, the last two left out."""
    limits = np.array([width, height] * 2)
    if len(boxes) and boxes.max() <= FRACTIONS and min(height, width) >= FRAME_SIDE and (boxes % 1).any():
        problem = f"all boxes lie within {FRACTIONS} pixels of the corner of a frame of {width}x{height}"
        raise InvalidInput(problem, expected="pixels", hint="multiply fractions by its width and height")
    outside = (boxes[:, 2:] <= 0).any(1) | (boxes[:, :2] >= limits[:2]).any(1)
    problem = f"lies outside of the frame of {width}x{height}"
    _refuse(outside, boxes, problem, "x1, y1, x2, y2 in pixels of this frame", "leave such boxes out")
    touched = np.hstack([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])])
    inside = np.clip(touched, 0, limits)
    cut = np.flatnonzero((np.abs(boxes - np.clip(boxes, 0, limits)) >= 1).any(1))
    if len(cut):
        reach = f"{len(cut)} of {len(boxes)} boxes reach out of the frame of {width}x{height}"
        _warn_once(width, height, f"{reach} and are cut off at its border, the first is box {cut[0]}")
    return inside.astype(np.int64)


def _warn_once(width: int, height: int, text: str) -> None:
    if (width, height) not in _warned:
        _warned.add((width, height))
        logging.getLogger("pmm").warning("%s", text)


def _refuse(wrong: Any, boxes: npt.NDArray[np.float64], problem: str, expected: str, hint: str = "") -> None:
    if wrong.any():
        index = int(wrong.argmax())
        numbers = ", ".join(f"{value:g}" for value in boxes[index])
        raise InvalidInput(f"box {index} ([{numbers}]) {problem}", index=index, expected=expected, hint=hint)


def _to_rgb(part: Crops, colour: str) -> Crops:
    """A copy [h, w, 3] of `part` [h, w, C]."""
    crop = np.empty((*part.shape[:2], 3), np.uint8)
    for channel, source in enumerate((0, 0, 0) if part.shape[2] == 1 else CHANNELS[colour]):
        crop[..., channel] = part[..., source]  # a quarter of the time of a copy backwards
    return crop
