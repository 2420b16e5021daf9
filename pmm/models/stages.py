"""A stage's head: pooled vector -> feature -> identity logits, and the weights of its Grad-CAM in closed form."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def _mean_of_all(rows: Tensor) -> Tensor:
    """The mean over the rows [N, ...] of all processes, as a batch-norm that is synchronised takes it."""
    mean = rows.mean(0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return mean


class Head(nn.Module):
    """Linear -> BatchNorm -> ReLU = feature [N, F]; Linear = logits [N, K].

    With `neck` the batch-norm is a BN-neck (Luo, Gu, Liao, Lai, Jiang; CVPR Workshops 2019): the triplet loss sees what
    comes before it, the classifier, without a bias, what comes after it, and there is no ReLU. Its own bias stays 0, so
    that the features of identities lie around the origin and the classifier tells them by their direction.

    `fan` is the mode of the first layer's Kaiming initialisation: the authors' stage I has a 1x1 convolution there
    (fan_in), the other stages a linear layer (fan_out).
    """

    def __init__(self, channels: int, feature_dim: int, num_classes: int, *, fan: str, neck: bool = False) -> None:
        super().__init__()
        self.neck = neck
        self.reduction = nn.Linear(channels, feature_dim)
        self.bn = nn.BatchNorm1d(feature_dim)
        self.activation = nn.Identity() if neck else nn.ReLU()
        self.classifier = nn.Linear(feature_dim, num_classes, bias=not neck)
        nn.init.kaiming_normal_(self.reduction.weight, mode=fan)  # type: ignore[arg-type]
        nn.init.zeros_(self.reduction.bias)
        if neck:
            self.bn.bias.requires_grad_(False)
            nn.init.normal_(self.classifier.weight, std=0.001)
        else:
            nn.init.normal_(self.bn.weight, 1.0, 0.02)
            nn.init.kaiming_normal_(self.classifier.weight, mode="fan_out")
            nn.init.zeros_(self.classifier.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """pooled [N, C] -> what the triplet loss sees [N, F], logits [N, K]."""
        reduced = self.reduction(pooled)
        feature = self.activation(self.bn(reduced))
        return reduced if self.neck else feature, self.classifier(feature)

    def feature(self, pooled: Tensor) -> Tensor:
        """pooled [N, C] -> feature [N, F] (what an embedding is made of)."""
        return self.activation(self.bn(self.reduction(pooled)))

    @torch.no_grad()
    def cam_weights(self, pooled: Tensor, pids: Tensor, cells: int) -> Tensor:
        """Grad-CAM's alpha [N, C] for S = sum_n logits[n, pids[n]] on a map of `cells` cells, in float32.

        The mean over the map of dS/dmap is (dS/dpooled) / cells, for average and max pooling alike; dS/dpooled is the
        head's backward written out (Linear^T, ReLU mask if there is one, batch-norm backward, Linear^T). A batch-norm
        in training mode couples the samples through the batch statistics, as in the authors' code; its running buffers
        are not touched. A synchronised one couples those of all processes, one that is frozen (in eval mode) none.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            wide = torch.float64 if pooled.dtype == torch.float64 else torch.float32
            hidden = F.linear(pooled.to(wide), self.reduction.weight.to(wide), self.reduction.bias.to(wide))
            if isinstance(self.bn, nn.SyncBatchNorm) and self.bn.training:
                mean = _mean_of_all(hidden)
                variance = _mean_of_all((hidden - mean).square())
            elif self.bn.training:
                variance, mean = torch.var_mean(hidden, dim=0, correction=0)
            else:
                mean, variance = self.bn.running_mean.to(wide), self.bn.running_var.to(wide)  # type: ignore[union-attr]
            scale = (variance + self.bn.eps).rsqrt()
            normalised = (hidden - mean) * scale
            gamma = self.bn.weight.to(wide)
            gradient = self.classifier.weight.to(wide)[pids] * gamma
            if not self.neck:
                gradient = gradient * (normalised * gamma + self.bn.bias.to(wide) > 0)
            if self.bn.training:
                means = torch.stack([gradient, gradient * normalised], 1)
                first, second = _mean_of_all(means) if isinstance(self.bn, nn.SyncBatchNorm) else means.mean(0)
                gradient = gradient - first - normalised * second
            return (gradient * scale) @ self.reduction.weight.to(wide) / cells
