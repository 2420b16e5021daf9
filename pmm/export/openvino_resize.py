"""PIL's resize as a part of an OpenVINO graph, for crops of any size: two products with matrices of weights.

OpenVINO's own RESIZE_BILINEAR_PILLOW rounds halves in another way: of crops at twice the model's size an eighth of the
pixels is another grey level then. This one is PIL's to the last grey level where PIL resizes the width first, as all
versions do before Pillow 13, which begins with the axis that costs less; where that is the height, every fifth pixel
may be one level off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pmm.utils.extras import import_library

CUBIC = -0.5
"""PIL's sharpness of bicubic."""


def resize_as_pil(images: Any, height: int, width: int, interpolation: str) -> Any:
    """The node uint8 [B, height, width, 3] of a node `images` uint8 [B, h, w, 3] with any h and w.

    Args:
        interpolation: bilinear or bicubic, with antialias.
    """
    op = import_library("openvino.opset13")
    sides = op.shape_of(images, "i64")
    planes = op.transpose(op.convert(images, "f32"), np.array([0, 3, 1, 2]))  # [B, 3, h, w]
    across = _weights(op, _side(op, sides, 2), width, interpolation)
    planes = _rounded(op, op.matmul(planes, across, transpose_a=False, transpose_b=True))
    down = _weights(op, _side(op, sides, 1), height, interpolation)
    planes = _rounded(op, op.matmul(down, planes, transpose_a=False, transpose_b=False))
    return op.convert(op.transpose(planes, np.array([0, 2, 3, 1])), "u8")


def _side(op: Any, sides: Any, axis: int) -> Any:
    return op.convert(op.gather(sides, np.int64(axis), np.int64(0)), "i32")


def _weights(op: Any, before: Any, after: int, interpolation: str) -> Any:
    """[after, before]: what of each pixel is in each resized one.

    Middles and distances are whole numbers of half a pixel of both sizes: those are exact in bf16, too.
    """
    two, one = np.int32(2), np.int32(1)
    middles = op.multiply(np.arange(1, 2 * after, 2, dtype=np.int32)[:, None], before)
    pixels = op.add(op.multiply(op.range(np.int32(0), before, one, "i32"), two), one)
    distances = op.subtract(op.multiply(pixels, np.int32(after)), middles)
    # a pixel that is smaller than before is a mean of all that it covers
    reach = op.multiply(op.maximum(before, np.int32(after)), two)
    weights = FILTERS[interpolation](op, op.abs(op.divide(op.convert(distances, "f32"), op.convert(reach, "f32"))))
    return op.divide(weights, op.reduce_sum(weights, np.array([1]), keep_dims=True))


def _triangle(op: Any, distance: Any) -> Any:
    return op.maximum(op.subtract(np.float32(1), distance), np.float32(0))


def _cubic(op: Any, distance: Any) -> Any:
    near = _polynomial(op, distance, CUBIC + 2, -(CUBIC + 3), 0, 1)
    far = _polynomial(op, distance, CUBIC, -5 * CUBIC, 8 * CUBIC, -4 * CUBIC)
    beyond = op.select(op.less(distance, np.float32(2)), far, np.float32(0))
    return op.select(op.less(distance, np.float32(1)), near, beyond)


def _polynomial(op: Any, x: Any, *factors: float) -> Any:
    value = op.multiply(x, np.float32(factors[0]))
    for factor in factors[1:-1]:
        value = op.multiply(op.add(value, np.float32(factor)), x)
    return op.add(value, np.float32(factors[-1]))


def _rounded(op: Any, pixels: Any) -> Any:
    """To whole grey levels, as PIL does behind each axis: halves up."""
    return op.clamp(op.round(pixels, "half_away_from_zero"), 0, 255)


FILTERS: dict[str, Callable[[Any, Any], Any]] = {"bilinear": _triangle, "bicubic": _cubic}
"""Interpolation -> weight by the distance, in resized pixels or, where those are smaller, in pixels."""
