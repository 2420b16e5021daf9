"""What clients make of pixels that are to be normalised, or not to be: scales other than the contract's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.config import IMAGENET_MEAN, IMAGENET_STD
from pmm.data.preprocessing import Crops

Pixels = npt.NDArray[Any]
"""RGB [N, H, W, 3]."""
Scale = Callable[[Pixels, Pixels, Pixels], Pixels]
"""Pixels of 0..255, a mean and a std [3] -> other numbers."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's preprocessing (Radford et al., 2021)."""
CAFFE_MEAN = (123.0, 117.0, 104.0)
"""Of red, green and blue, of 255: of the networks that Caffe published, which took BGR."""


def _saturated(floats: Pixels) -> Crops:
    """As OpenCV's convertTo does it."""
    return np.rint(floats).clip(0, 255).astype(np.uint8)


def _wrapped(floats: Pixels) -> Crops:
    """As C and numpy do it: cut towards zero, and the lowest 8 bits."""
    return floats.astype(np.int64).astype(np.uint8)


def without_caffe_mean(pixels: Pixels, mean: Pixels, std: Pixels) -> Pixels:
    """RGB of 0..255, a mean and a std that do not count -> RGB without the mean of Caffe's networks."""
    return pixels - np.array(CAFFE_MEAN, np.float32)


SCALES: dict[str, tuple[str, Scale]] = {
    "unnormalised": ("pixels in 0..1, not normalised", lambda x, mean, std: x / 255),
    "raw": ("pixels in 0..255, neither divided nor normalised", lambda x, mean, std: x),
    "undivided": ("normalised without a division by 255", lambda x, mean, std: (x - mean) / std),
    "normalised": ("normalised by the client", lambda x, mean, std: (x / 255 - mean) / std),
    "divided_twice": ("divided by 255 twice", lambda x, mean, std: (x / 255 / 255 - mean) / std),
    "normalised_twice": ("normalised twice", lambda x, mean, std: ((x / 255 - mean) / std - mean) / std),
    "minus_one_to_one": ("the mean 0.5 and the std 0.5, so pixels in -1..1", lambda x, mean, std: x / 127.5 - 1),
    "by_256": ("divided by 256, not by 255", lambda x, mean, std: (x / 256 - mean) / std),
    "mean_only": ("the mean taken off, not divided by the std", lambda x, mean, std: x / 255 - mean),
    "statistics_bgr": (
        "the mean and the std in the order blue, green, red",
        lambda x, mean, std: (x / 255 - mean[::-1]) / std[::-1],
    ),
    "imagenet": (
        "the mean and the std of ImageNet",
        lambda x, mean, std: (x / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD),
    ),
    "clip": (
        "the mean and the std of CLIP",
        lambda x, mean, std: (x / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD),
    ),
    "caffe": ("Caffe's mean of 123, 117, 104 taken off, not divided", without_caffe_mean),
}
"""What a client can make of pixels RGB of 0..255 where floats are to be normalised, the mean and the std known: in
words, and in numbers."""
OF_PIXELS = ("unnormalised", "undivided", "normalised", "minus_one_to_one", "mean_only", "caffe")
"""Of these, what can be told apart where the file takes the pixels as they are."""
BYTES: dict[str, tuple[str, Scale]] = {
    "normalised": (
        "normalised floats, rounded to whole numbers of 0 to 255",
        lambda x, mean, std: _saturated((x / 255 - mean) / std),
    ),
    "wrapped": (
        "normalised floats, the lowest 8 bits of their whole part",
        lambda x, mean, std: _wrapped((x / 255 - mean) / std),
    ),
    "unnormalised": ("pixels in 0..1, rounded to 0 and 1", lambda x, mean, std: _saturated(x / 255)),
}
"""The same where bytes are."""
