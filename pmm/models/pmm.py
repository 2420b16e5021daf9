"""PMM: Progressive Multi-stage feature Mix (Zhang, He, Sun, Li; ICASSP 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from pmm.config import ModelConfig
from pmm.models.multi_branch import MultiBranchNet
from pmm.models.output import Mix, MixedLabels, TrainOutput
from pmm.ops import hard_mix_max_pool, mixed_cam, sample_partners
from pmm.ops.mixed_cam import cam


class PMM(MultiBranchNet):
    """Three stages on one backbone. F1 = backbone; X = extra bottleneck of F1.

    Stage I pools F1 by average. In training, stage II pools Hard-Mix(X, CAM(F1, z1)) by maximum and stage III
    Hard-Mix(X, CAM(X2, z2)), each with freshly drawn partners; at test both pool X itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.feature_dim,) * 3)
        self.block, self.k, self.on_empty = config.block, config.k, config.on_empty

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """With the mixes; `generator` draws the partners."""
        mixes = self.mixes(f1, x, average, pids, generator)
        labels = (self.labels(pids, mix.partner, mix.replaced) for mix in mixes)
        return self.heads(average, *(mix.pooled for mix in mixes), mixed=(None, *labels))

    def mixes(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> tuple[Mix, Mix]:
        """The Hard-Mixes of X before stages II and III; arguments as in `train_stages`."""
        head1, head2, _ = self.stages
        cells = f1.shape[2] * f1.shape[3]

        def mix(guide: Tensor) -> Mix:
            partner = sample_partners(pids, generator)
            pooled, replaced = self.mixed_max(x, guide, partner)
            return Mix(guide, partner, replaced, pooled)

        second = mix(cam(f1, head1.cam_weights(average, pids, cells)))  # type: ignore[operator]
        weights = head2.cam_weights(second.pooled, pids, cells)  # type: ignore[operator]
        return second, mix(mixed_cam(x, second.partner, second.replaced, weights))

    def mixed_max(self, x: Tensor, cam: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima [N, C] of X mixed where `cam` [N, H, W] says, and the cells [N, H, W] taken from the partner."""
        return hard_mix_max_pool(x, cam, partner, self.block, self.k, on_empty=self.on_empty)

    def labels(self, pids: Tensor, partner: Tensor, taken: Tensor) -> MixedLabels | None:
        """The labels of mixed maps: the anchor's alone."""
        return None
