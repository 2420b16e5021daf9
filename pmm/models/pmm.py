"""PMM: Progressive Multi-stage feature Mix (Zhang, He, Sun, Li; ICASSP 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from pmm.config import ModelConfig
from pmm.models.output import TrainOutput
from pmm.models.two_maps import TwoMaps
from pmm.ops import hard_mix_max_pool, mixed_cam, sample_partners
from pmm.ops.mixed_cam import cam


class PMM(TwoMaps):
    """Three stages on one trunk. F1 = trunk; X = extra bottleneck of F1.

    Stage I pools F1 by average. In training, stage II pools Hard-Mix(X, CAM(F1, z1)) by maximum and stage III
    Hard-Mix(X, CAM(X2, z2)), each with freshly drawn partners; at test both pool X itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.feature_dim,) * 3)
        self.block, self.k, self.on_empty = config.block, config.k, config.on_empty

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """Mixed; `generator` draws the partners."""
        head1, head2, _ = self.stages
        cells = f1.shape[2] * f1.shape[3]
        mix = {"block": self.block, "k": self.k, "on_empty": self.on_empty}

        cam1 = cam(f1, head1.cam_weights(average, pids, cells))  # type: ignore[operator]
        partner = sample_partners(pids, generator)
        pooled2, replaced = hard_mix_max_pool(x, cam1, partner, **mix)  # type: ignore[arg-type]

        cam2 = mixed_cam(x, partner, replaced, head2.cam_weights(pooled2, pids, cells))  # type: ignore[operator]
        pooled3, _ = hard_mix_max_pool(x, cam2, sample_partners(pids, generator), **mix)  # type: ignore[arg-type]
        return self.heads(average, pooled2, pooled3)
