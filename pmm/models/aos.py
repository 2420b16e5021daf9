"""AOS: Adversarially Occluded Samples (Huang, Li, Zhang, Chen, Huang; CVPR 2018). What is hidden of the crops of its
second training is in `pmm.data.occlusion`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmm.config import ModelConfig
from pmm.models.backbone import build_backbone
from pmm.models.baseline import OneMap
from pmm.models.output import Evidence, InferenceModel, L2Normalize, ReidModel, TrainOutput, drop, leaf
from pmm.models.pcb import small_classifier


class AOS(ReidModel):
    """A backbone, its average and a classifier behind a dropout; the embedding is the average, with norm 1.

    With `config.neck` "bn", which the paper has not, a BN-neck follows the average. A network that begins with random
    weights needs it: the averages of all crops are nearly the same at first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.last_stride)
        self.dropout = config.dropout
        self.average = nn.Sequential(_Average())
        if config.neck == "bn":
            neck = nn.BatchNorm1d(self.backbone.channels)
            neck.bias.requires_grad_(False)  # as of every BN-neck: what shifts all embeddings alike tells nobody apart
            self.average.append(neck)
        self.classifier = small_classifier(self.backbone.channels, config.num_classes)
        self.embedding_dim, self.normalised = self.backbone.channels, True
        self.l2_normalize = L2Normalize()

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput:
        """As `pmm.models.multi_branch.MultiBranchNet.forward`; `pids` only choose training, whose output has no
        features."""
        average = self.average(self.backbone(images))
        if pids is None:
            return self.l2_normalize(average)
        return TrainOutput((), (self.classifier(drop(average, self.dropout, generator)),))

    def evidence(self, images: Tensor) -> list[Evidence]:
        maps = leaf(self.backbone(images))
        return [Evidence("the classifier\naverage of the map", maps, self.classifier(self.average(maps)))]

    def deployed(self) -> InferenceModel:
        """The test-time network: without the classifier."""
        return InferenceModel(OneMap(self.backbone), self.average, normalised=True)


class _Average(nn.Module):
    """Map [N, C, h, w] -> its mean [N, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))
