"""BDB: Batch DropBlock Network (Dai, Chen, Gu, Zhu, Tan; ICCV 2019), the network that PMM set out from."""

from __future__ import annotations

import torch
from torch import Tensor

from pmm.config import ModelConfig
from pmm.models.multi_branch import MultiBranchNet
from pmm.models.output import TrainOutput

HEIGHT_RATIO = 0.33
WIDTH_RATIO = 1.0
"""Share of the map's rows and columns that is dropped, as the authors have it for people."""


class BDB(MultiBranchNet):
    """Two branches on one trunk. F1 = trunk; X = extra bottleneck of F1.

    The global branch pools F1 by average. In training, the other pools by maximum what is left of X after one
    rectangle, the same for the whole batch, is set to zero; at test it pools X itself. Its feature has twice the
    global one's dimensions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.feature_dim, 2 * config.feature_dim))

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """Dropped; `generator` draws the rectangle."""
        dropped = x.masked_fill(drop_mask(x.shape[2], x.shape[3], x.device, generator), 0)
        return self.heads(average, dropped.amax((2, 3)))


def drop_mask(
    height: int, width: int, device: torch.device, generator: torch.Generator | None = None, count: int | None = None
) -> Tensor:
    """True in one rectangle of round(0.33 * height) by round(1.0 * width) cells at a uniform position: [height, width].

    With `count` as many, drawn independently: [count, height, width]. `generator` is on `device` (None: torch's
    default); nothing is copied to the host.
    """
    shape = () if count is None else (count,)
    rows = _span(height, round(HEIGHT_RATIO * height), shape, device, generator)
    columns = _span(width, round(WIDTH_RATIO * width), shape, device, generator)
    return rows[..., None] & columns[..., None, :]


def _span(
    size: int, length: int, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """True for `length` of `size` neighbours [*shape, size], their start uniform over all that fit."""
    start = torch.randint(size - length + 1, (*shape, 1), generator=generator, device=device)
    index = torch.arange(size, device=device)
    return (index >= start) & (index < start + length)
