"""ResNet-50-IBN-a (Pan, Luo, Shi, Tang; ECCV 2018): instance norm beside batch-norm in the first three stages."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet


class InstanceBatchNorm(nn.Module):
    """Instance norm of the first half of the channels, batch-norm of the rest; keys `IN.*` and `BN.*` as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.instances = channels // 2
        self.IN = nn.InstanceNorm2d(self.instances, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.instances)

    def forward(self, maps: Tensor) -> Tensor:
        """maps [N, C, h, w] -> the same shape."""
        first, rest = maps.split([self.instances, maps.shape[1] - self.instances], 1)
        return torch.cat([self.IN(first), self.BN(rest)], 1)


def resnet50_ibn_a() -> ResNet:
    """Torchvision's ResNet-50 with an `InstanceBatchNorm` as bn1 of each block of layer1, layer2 and layer3."""
    net = resnet50(weights=None)
    for layer in (net.layer1, net.layer2, net.layer3):
        for block in layer:
            bottleneck = cast(Bottleneck, block)
            bottleneck.bn1 = InstanceBatchNorm(bottleneck.bn1.num_features)
    return net
