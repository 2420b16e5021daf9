"""The baseline: a backbone, its average and one head, which is PMM's stage I alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmm.config import ModelConfig
from pmm.models.backbone import build_backbone
from pmm.models.output import Evidence, InferenceModel, L2Normalize, ReidModel, TrainOutput, leaf
from pmm.models.stages import Head


class Baseline(ReidModel):
    """The average of F1 = backbone through one head; nothing in it is random."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.last_stride)
        dim, neck = config.feature_dim, config.neck == "bn"
        self.stages = nn.ModuleList([Head(self.backbone.channels, dim, config.num_classes, fan="fan_in", neck=neck)])
        self.embedding_dim, self.normalised = dim, config.metric == "cosine"
        self.l2_normalize = L2Normalize() if self.normalised else nn.Identity()

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput:
        """As `pmm.models.multi_branch.MultiBranchNet.forward`; `pids` only choose training, `generator` is not used."""
        (head,) = self.stages
        average = self.backbone(images).mean((2, 3))
        if pids is None:
            return self.l2_normalize(head.feature(average))  # type: ignore[operator]
        feature, logits = head(average)
        return TrainOutput((feature,), (logits,))

    def evidence(self, images: Tensor) -> list[Evidence]:
        f1 = leaf(self.backbone(images))
        return [Evidence("stage I\naverage of F1", f1, self.stages[0](f1.mean((2, 3)))[1])]

    def deployed(self) -> InferenceModel:
        """The test-time network: the classifier is left out."""
        (head,) = self.stages
        return InferenceModel(OneMap(self.backbone), _AverageTail(head), normalised=self.normalised)  # type: ignore[arg-type]


class OneMap(nn.Module):
    """images -> (F1,)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.backbone(images),)


class _AverageTail(nn.Module):
    """F1 -> the embedding."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = nn.Sequential(head.reduction, head.bn, head.activation)

    def forward(self, f1: Tensor) -> Tensor:
        return self.head(f1.mean((2, 3)))
