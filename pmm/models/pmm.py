"""PMM: Progressive Multi-stage feature Mix (Zhang, He, Sun, Li; ICASSP 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from pmm.config import ModelConfig
from pmm.models.backbone import build_backbone
from pmm.models.output import Deployed, TrainOutput
from pmm.models.stages import Head
from pmm.ops import hard_mix_max_pool, mixed_cam, sample_partners
from pmm.ops.mixed_cam import cam


class PMM(nn.Module):
    """Three stages on one trunk. F1 = trunk; X = extra bottleneck of F1.

    Stage I pools F1 by average. In training, stage II pools Hard-Mix(X, CAM(F1, z1)) by maximum and stage III
    Hard-Mix(X, CAM(X2, z2)), each with freshly drawn partners; at test both pool X itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.block, self.k, self.on_empty = config.block, config.k, config.on_empty
        self.backbone = build_backbone(config.backbone)
        channels = self.backbone.channels
        self.bottleneck = Bottleneck(channels, channels // Bottleneck.expansion)
        self.stages = nn.ModuleList(
            Head(channels, config.feature_dim, config.num_classes, fan=fan) for fan in ("fan_in", "fan_out", "fan_out")
        )
        self.embedding_dim = 3 * config.feature_dim

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput:
        """images [N, 3, H, W], normalised.

        Without `pids`: the unnormalised embedding [N, 3F], no mixing. With `pids` [N] (class indices): features and
        logits of the three stages, mixed; `generator` draws the partners.
        """
        f1 = self.backbone(images)
        x = self.bottleneck(f1)
        average = f1.mean((2, 3))
        if pids is None:
            largest = x.amax((2, 3))
            pooled = (average, largest, largest)
            return torch.cat([head.feature(p) for head, p in zip(self.stages, pooled, strict=True)], 1)  # type: ignore[operator]
        return self._mixed(f1, x, average, pids, generator)

    def _mixed(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        head1, head2, head3 = self.stages
        cells = f1.shape[2] * f1.shape[3]
        mix = {"block": self.block, "k": self.k, "on_empty": self.on_empty}

        cam1 = cam(f1, head1.cam_weights(average, pids, cells))  # type: ignore[operator]
        partner = sample_partners(pids, generator)
        pooled2, replaced = hard_mix_max_pool(x, cam1, partner, **mix)  # type: ignore[arg-type]

        cam2 = mixed_cam(x, partner, replaced, head2.cam_weights(pooled2, pids, cells))  # type: ignore[operator]
        pooled3, _ = hard_mix_max_pool(x, cam2, sample_partners(pids, generator), **mix)  # type: ignore[arg-type]

        outputs = [head(p) for head, p in zip((head1, head2, head3), (average, pooled2, pooled3), strict=True)]
        return TrainOutput(features=tuple(f for f, _ in outputs), logits=tuple(z for _, z in outputs))

    def deployed(self) -> Deployed:
        """The test-time network: stages II and III read the same vector, so their reductions are one layer."""
        return Deployed(_Maps(self.backbone, self.bottleneck), _Tail(*self.stages))


class _Maps(nn.Module):
    """images -> (F1, X)."""

    def __init__(self, backbone: nn.Module, bottleneck: nn.Module) -> None:
        super().__init__()
        self.backbone, self.bottleneck = backbone, bottleneck

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        f1 = self.backbone(images)
        return f1, self.bottleneck(f1)


class _Tail(nn.Module):
    """(F1, X) -> the embedding of the three stages."""

    def __init__(self, head1: Head, head2: Head, head3: Head) -> None:
        super().__init__()
        self.average_head = nn.Sequential(head1.reduction, head1.bn)
        self.max_head = nn.Sequential(_stack_linear(head2.reduction, head3.reduction), _stack_bn(head2.bn, head3.bn))

    def forward(self, f1: Tensor, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.average_head(f1.mean((2, 3))), self.max_head(x.amax((2, 3)))], 1))


def _stack_linear(a: nn.Linear, b: nn.Linear) -> nn.Linear:
    both = nn.Linear(a.in_features, a.out_features + b.out_features, device=a.weight.device, dtype=a.weight.dtype)
    both.load_state_dict({"weight": torch.cat([a.weight, b.weight]), "bias": torch.cat([a.bias, b.bias])})
    return both


def _stack_bn(a: nn.BatchNorm1d, b: nn.BatchNorm1d) -> nn.BatchNorm1d:
    both = nn.BatchNorm1d(a.num_features + b.num_features, eps=a.eps, device=a.weight.device, dtype=a.weight.dtype)
    state_a, state_b = a.state_dict(), b.state_dict()
    both.load_state_dict({key: torch.cat([v, state_b[key]]) if v.dim() else v for key, v in state_a.items()})
    return both.train(a.training)
