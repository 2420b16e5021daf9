"""Re-identification by colour histograms alone: the measure of how much of a data set needs no learning.

    {RGB, HSV, HSV after grey-world correction} x {whole crop, 6 horizontal stripes} x {whole width, centre half}

A histogram is L1-normalised per stripe and square-rooted, so that a dot product of two is their Hellinger affinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RGB_BINS = (6, 6, 6)
HSV_BINS = (12, 5, 4)


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """One way of taking histograms."""

    colour: str
    """rgb, hsv, or grey-world-hsv."""
    stripes: int
    centre: bool
    """Whether only the middle half of the width is counted: less background, but arms and bags are lost."""


MATCHERS: dict[str, Matcher] = {
    f"{colour} {'stripes' if stripes > 1 else 'whole'} {'centre' if centre else 'width'}": Matcher(
        colour=colour, stripes=stripes, centre=centre
    )
    for colour in ("rgb", "hsv", "grey-world-hsv")
    for stripes in (1, 6)
    for centre in (False, True)
}


def histogram_features(images_uint8: np.ndarray, kind: str) -> np.ndarray:
    """Features [N, D] float32 of images [N, H, W, 3] uint8 by the matcher named `kind`; rows have length 1."""
    matcher = MATCHERS[kind]
    images = images_uint8
    if matcher.colour == "grey-world-hsv":
        images = grey_world(images)
    bins = RGB_BINS if matcher.colour == "rgb" else HSV_BINS
    values = images / np.float32(256) if matcher.colour == "rgb" else rgb_to_hsv(images)
    levels = np.minimum((values * np.array(bins)).astype(np.int64), np.array(bins) - 1)
    codes = (levels[..., 0] * bins[1] + levels[..., 1]) * bins[2] + levels[..., 2]
    if matcher.centre:
        width = codes.shape[2]
        codes = codes[:, :, width // 4 : width - width // 4]
    size = int(np.prod(bins))
    parts = [_histogram(stripe, size) for stripe in np.array_split(codes, matcher.stripes, axis=1)]
    features = np.sqrt(np.concatenate(parts, axis=1))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def grey_world(images: np.ndarray) -> np.ndarray:
    """Scale each channel so that the mean of every image [N, H, W, 3] uint8 is grey."""
    means = images.reshape(len(images), -1, 3).mean(axis=1)
    gains = means.mean(axis=1, keepdims=True) / np.maximum(means, 1)
    return np.clip(np.rint(images * gains[:, None, None, :]), 0, 255).astype(np.uint8)


def rgb_to_hsv(images: np.ndarray) -> np.ndarray:
    """Hue, saturation and value, each in [0, 1], of images [N, H, W, 3] uint8."""
    rgb = images.astype(np.float32) / 255
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = rgb.max(axis=-1)
    chroma = value - rgb.min(axis=-1)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [chroma == 0, value == red, value == green],
        [np.zeros_like(value), ((green - blue) / safe) % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    saturation = np.where(value > 0, chroma / np.where(value > 0, value, 1), 0)
    return np.stack([hue / 6, saturation, value], axis=-1)


def _histogram(codes: np.ndarray, size: int) -> np.ndarray:
    """L1-normalised histograms [N, size] of codes [N, H, W]."""
    number = len(codes)
    offsets = np.arange(number)[:, None] * size
    flat = (codes.reshape(number, -1) + offsets).ravel()
    counts = np.bincount(flat, minlength=number * size).reshape(number, size)
    return counts / counts.sum(axis=1, keepdims=True)
