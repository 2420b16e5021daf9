"""CutOut on feature maps: PMM's three stages, each mix replaced by zeroing a rectangle (our reading of its Table 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from pmm.config import ModelConfig
from pmm.models.bdb import drop_mask
from pmm.models.multi_branch import MultiBranchNet
from pmm.models.output import TrainOutput


class CutoutBatch(MultiBranchNet):
    """In training, stages II and III pool what is left of X after a rectangle of BDB's size is set to zero.

    Each stage draws its own, the same for the whole batch; at test both pool X itself.
    """

    per_sample = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.feature_dim,) * 3)

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """Dropped; `generator` draws the rectangles."""
        return self.heads(average, self._dropped_max(x, generator), self._dropped_max(x, generator))

    def _dropped_max(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        n, _, height, width = x.shape
        mask = drop_mask(height, width, x.device, generator, n if self.per_sample else 1)
        return x.masked_fill(mask[:, None], 0).amax((2, 3))


class CutoutSample(CutoutBatch):
    """The same with a rectangle of its own for each sample."""

    per_sample = True
