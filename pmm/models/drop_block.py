"""Methods that set a rectangle of the feature map to zero: BDB, and CutOut in PMM's three stages.

BDB is the Batch DropBlock Network (Dai, Chen, Gu, Zhu, Tan; ICCV 2019), from which PMM is derived; CutOut is our
reading of PMM's Table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmm.config import ModelConfig
from pmm.models.multi_branch import MultiBranchNet
from pmm.models.output import TrainOutput

HEIGHT_RATIO = 0.33
WIDTH_RATIO = 1.0
"""Share of the map's rows and columns that is dropped, as in the authors' code for people."""


class BDB(MultiBranchNet):
    """Two branches on one backbone. F1 = backbone; X = extra bottleneck of F1.

    The global branch pools F1 by average. The other pools X by maximum, in training after one rectangle, the same for
    the whole batch, is set to zero; its feature has twice the dimensions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.feature_dim, 2 * config.feature_dim))

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """With the rectangle, which `generator` draws."""
        dropped = x.masked_fill(drop_mask(x.shape[2], x.shape[3], x.device, generator), 0)
        return self.heads(average, dropped.amax((2, 3)))


class CutoutBatch(MultiBranchNet):
    """PMM's stages without mixing: in training, stages II and III pool X after a rectangle is set to zero.

    It has BDB's size; each stage draws one, the same for the whole batch. At test both pool X itself.
    """

    per_sample = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.feature_dim,) * 3)

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """With the rectangles, which `generator` draws."""
        return self.heads(average, self._dropped_max(x, generator), self._dropped_max(x, generator))

    def _dropped_max(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        n, _, height, width = x.shape
        mask = drop_mask(height, width, x.device, generator, n if self.per_sample else 1)
        return x.masked_fill(mask[:, None], 0).amax((2, 3))


class CutoutSample(CutoutBatch):
    """CutoutBatch with a rectangle for each sample."""

    per_sample = True


def drop_mask(
    height: int, width: int, device: torch.device, generator: torch.Generator | None = None, count: int | None = None
) -> Tensor:
    """True in one rectangle of round(0.33 * height) by round(1.0 * width) cells at a uniform position: [height, width].

    With `count`, that many, drawn independently: [count, height, width]. `generator` is on `device` (None: torch's
    default); nothing is copied to the host.
    """
    shape = () if count is None else (count,)
    rows = _span(height, round(HEIGHT_RATIO * height), shape, device, generator)
    columns = _span(width, round(WIDTH_RATIO * width), shape, device, generator)
    return rows[..., None] & columns[..., None, :]


def _span(
    size: int, length: int, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """True for `length` consecutive cells of `size` [*shape, size], at a uniform position."""
    start = torch.randint(size - length + 1, (*shape, 1), generator=generator, device=device)
    index = torch.arange(size, device=device)
    return (index >= start) & (index < start + length)
