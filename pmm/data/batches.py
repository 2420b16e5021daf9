"""A training batch as it is loaded, in uint8, and as the network takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pmm.data.preprocessing import Preprocessing


class TrainBatch(NamedTuple):
    """A batch of B crops; see `normalize_batch`."""

    crops: Tensor
    """uint8 [B, H, W, 3], shifted."""
    mirrored: Tensor
    """bool [B]: whether to mirror a crop."""
    cutouts: Tensor
    """int64 [B, 4]: top, left, bottom, right of the (mirrored) crop; all 0 for none."""
    labels: Tensor
    """int64 [B], class indices."""
    indices: Tensor
    """int64 [B], of the samples."""


def normalize_batch(batch: TrainBatch, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """float32 [B, 3, H, W] on `device`, channels_last: the crops mirrored and normalised, then zeros for Cutout."""
    normalize = _normalize_by_crop if device.type == "cpu" else _normalize_at_once
    return normalize(batch, *_scale_and_offset(preprocessing, device), device).permute(0, 3, 1, 2)


def _normalize_at_once(batch: TrainBatch, scale: Tensor, offset: Tensor, device: torch.device) -> Tensor:
    """[B, H, W, 3] by a few operators on the whole batch: a GPU needs as long to start one as to run it."""
    crops, mirrored = (part.to(device, non_blocking=True) for part in (batch.crops, batch.mirrored))
    crops = torch.where(mirrored[:, None, None, None], crops.flip(2), crops)
    images = (crops * scale).sub_(offset)
    top, left, bottom, right = batch.cutouts.to(device, non_blocking=True)[:, :, None].unbind(1)
    y, x = (torch.arange(size, device=device) for size in crops.shape[1:3])
    cut = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
    return images.masked_fill_(cut[..., None], 0)


def _normalize_by_crop(batch: TrainBatch, scale: Tensor, offset: Tensor, device: torch.device) -> Tensor:
    """[B, H, W, 3] crop by crop, in the caches of a CPU: a tenth of the time."""
    count, height, width, _ = batch.crops.shape
    images = torch.empty(batch.crops.shape, dtype=torch.float32)
    rows = images.view(count, height, 3 * width)  # torch is many times faster on long rows than on 3 channels
    scale, offset = scale.repeat(width), offset.repeat(width)
    mirrored, cutouts = batch.mirrored.tolist(), batch.cutouts.tolist()
    with _one_thread():
        for place, (top, left, bottom, right) in enumerate(cutouts):
            crop = batch.crops[place]
            images[place] = crop.flip(1) if mirrored[place] else crop
            rows[place].mul_(scale).sub_(offset)
            images[place, top:bottom, left:right] = 0
    return images


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread: several would wait for each other, because loading workers use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _scale_and_offset(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    scale, offset = preprocessing.scale_and_offset()
    return torch.from_numpy(scale).to(device), torch.from_numpy(offset).to(device)
