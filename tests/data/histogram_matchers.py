"""Re-identification by colour histograms alone: the measure of how much of a data set needs no learning.

    {RGB, HSV, HSV after grey-world correction} x {whole crop, 6 horizontal stripes} x {whole width, centre half}

A histogram is L1-normalised per stripe and square-rooted, so that a dot product of two is their Hellinger affinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RGB_BINS = (6, 6, 6)
HSV_BINS = (12, 5, 4)
BATCH = 256


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


def histogram_features(images: np.ndarray) -> dict[str, np.ndarray]:
    """Features [N, D] float32 of images [N, H, W, 3] uint8 by each of `MATCHERS`; rows have length 1."""
    batches = [_features(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in MATCHERS}


def _features(images: np.ndarray) -> dict[str, np.ndarray]:
    codes = {
        "rgb": _codes(images / np.float32(256), RGB_BINS),
        "hsv": _codes(rgb_to_hsv(images), HSV_BINS),
        "grey-world-hsv": _codes(rgb_to_hsv(grey_world(images)), HSV_BINS),
    }
    return {name: _matched(codes[matcher.colour], matcher) for name, matcher in MATCHERS.items()}


def _codes(values: np.ndarray, bins: tuple[int, int, int]) -> np.ndarray:
    """The bin [N, H, W] of each of `values` [N, H, W, 3], from 0 to 1."""
    levels = np.minimum((values * np.array(bins)).astype(np.int64), np.array(bins) - 1)
    return (levels[..., 0] * bins[1] + levels[..., 1]) * bins[2] + levels[..., 2]


def _matched(codes: np.ndarray, matcher: Matcher) -> np.ndarray:
    if matcher.centre:
        width = codes.shape[2]
        codes = codes[:, :, width // 4 : width - width // 4]
    size = int(np.prod(RGB_BINS if matcher.colour == "rgb" else HSV_BINS))
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
