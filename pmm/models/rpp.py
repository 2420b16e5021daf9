"""PCB with Refined Part Pooling (Sun, Zheng, Yang, Tian, Wang; ECCV 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmm.config import ModelConfig
from pmm.models.output import drop
from pmm.models.pcb import PCB

LEAST_PART = "least_part"
"""Of the figures in training: the share of all cells that the smallest part has, about 1/p where parts are alive."""
STRIPES = "stripes"
"""Name of the phase that trains PCB."""
CLASSIFIER_CHANNELS = 256
"""That the part classifier sees: means of 8 neighbours of 2,048."""


class PartClassifier(nn.Module):
    """Maps [N, C, h, w] -> the shares [N, p, h, w] of each cell that belong to each part, which add up to 1.

    It sees means of neighbouring channels, 256 of them, without their mean over the map (as the authors'
    code, github.com/syfafterzy/PCB_RPP_for_reID).
    """

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__()
        self.merged = max(1, channels // CLASSIFIER_CHANNELS)
        self.conv = nn.Conv2d(channels // self.merged, parts, 1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        _, channels, rows, columns = maps.shape
        # means by reshaping: AvgPool3d, as the authors have it, is missing in some runtimes
        merged = maps.reshape(-1, channels // self.merged, self.merged, rows, columns).mean(2)
        centred = merged - merged.mean((2, 3), keepdim=True)
        return self.conv(centred).softmax(1)


class SoftParts(nn.Module):
    """Maps [N, C, h, w] -> [N, C, p]: the sum of all cells for each part, weighted by its shares, times p / (h w).

    Divided by a constant, not by the sum of the shares: shares that are the stripes give PCB's means, which its heads
    know.
    """

    def __init__(self, classifier: PartClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, maps: Tensor) -> Tensor:
        return pooled_by(self.classifier(maps), maps)


def pooled_by(shares: Tensor, maps: Tensor) -> Tensor:
    """Maps [N, C, h, w] pooled by shares [N, p, h, w]: [N, C, p]."""
    parts, cells = shares.shape[1], shares.shape[2] * shares.shape[3]
    return maps.flatten(2) @ shares.flatten(2).transpose(1, 2) * (parts / cells)


class RPP(PCB):
    """PCB whose stripes become soft parts after a first phase of training: each cell belongs to each part by a share.

    The shares are learnt from the identities alone; the phase with stripes gives the parts their meaning.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.part_classifier = PartClassifier(self.backbone.channels, self.parts)
        self.refined = True

    def start_phase(self, name: str) -> None:
        self.refined = name != STRIPES

    def pooling(self) -> nn.Module:
        return SoftParts(self.part_classifier) if self.refined else self.stripes

    def part_shares(self, images: Tensor) -> Tensor | None:
        return self.cell_shares(self.backbone(images)) if self.refined else None

    def cell_shares(self, maps: Tensor) -> Tensor:
        return self.part_classifier(maps) if self.refined else super().cell_shares(maps)

    def train_pool(self, maps: Tensor, generator: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The part classifier sees the maps with dropout, the parts without. With the share of the least part."""
        if not self.refined:
            return super().train_pool(maps, generator)
        shares = self.part_classifier(drop(maps, self.dropout, generator))
        # in bf16 a mean of a quarter has steps of a thousandth
        return pooled_by(shares, maps), {LEAST_PART: shares.detach().float().mean((0, 2, 3)).amin()}
