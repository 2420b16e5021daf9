"""Files of crops -> the statistics of their colours. Loads no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pmm.data.crop_statistics import CropStatistics
from pmm.data.crops import iter_crops
from pmm.data.preprocessing import Resize
from pmm.data.readers import read_dataset
from pmm.data.samples import evenly_spaced
from pmm.utils.errors import InvalidFile, UserError

SAMPLE = 128
"""Crops that are read at most: their means are within a few grey levels of those of all."""
BATCH = 64
DIGITS = 2


def crop_statistics(paths: Sequence[Path], size: Resize) -> CropStatistics | None:
    """Of a sample of the crops at `paths`, spread evenly over them; the same for the same files, on any number of
    threads. Crops that cannot be read are left out; None if none can be read."""
    chosen = [paths[index] for index in evenly_spaced(len(paths), SAMPLE)]
    unreadable: dict[int, InvalidFile] = {}
    levels, pixels = np.arange(256), np.zeros((3, 256), np.int64)
    for crops in iter_crops(chosen, size, BATCH, unreadable=unreadable):
        pixels += [np.bincount(crops[..., channel].ravel(), minlength=256) for channel in range(3)]
    count = len(chosen) - len(unreadable)
    if not count:
        return None
    pixels[:, 0] -= len(unreadable) * size.height * size.width  # they were given as black ones
    mean = np.average(np.tile(levels, (3, 1)), axis=1, weights=pixels)
    variance = np.average((levels - mean[:, None]) ** 2, axis=1, weights=pixels)
    return CropStatistics(mean=_rounded(mean), std=_rounded(np.sqrt(variance)), crops=count)


def dataset_statistics(name: str, root: str, size: Resize) -> CropStatistics | None:
    """Of the training crops of the data set `name` in `root`; None if either is empty, or it cannot be read here."""
    if not (name and root):
        return None
    with contextlib.suppress(UserError):
        return crop_statistics([sample.path for sample in read_dataset(name, root).train], size)
    return None


def _rounded(channels: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    red, green, blue = channels.round(DIGITS).tolist()
    return red, green, blue
