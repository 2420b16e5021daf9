"""PCB: the Part-based Convolutional Baseline (Sun, Zheng, Yang, Tian, Wang; ECCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmm.config import ModelConfig
from pmm.models.backbone import build_backbone
from pmm.models.baseline import OneMap
from pmm.models.output import Evidence, InferenceModel, L2Normalize, ReidModel, TrainOutput, drop, leaf
from pmm.utils.errors import InvalidValue, one_of


class PartReduction(nn.Module):
    """1x1 convolution -> BatchNorm -> ReLU: parts [N, C, q] -> features [N, F, q], by the same statistics."""

    def __init__(self, channels: int, feature_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, feature_dim, 1, bias=False)
        self.bn = nn.BatchNorm1d(feature_dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(pooled)))


class PCB(ReidModel):
    """A classifier for each of p stripes of the map, all of the same height; the loss is the sum of p cross-entropies.

    Embedding `g`: the means of the stripes, each of norm 1, concatenated; `h`: the same of the outputs of the parts'
    reductions before the batch-norm. Divided by sqrt(p), the whole has norm 1; its ranking is that of the parts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.last_stride)
        channels, dim, self.parts = self.backbone.channels, config.feature_dim, config.parts
        self.stripes = StripeMeans(self.parts)
        # before the reduction: behind it, it costs accuracy (github.com/huanghoujing/beyond-part-models/issues/18)
        self.dropout = config.dropout
        count = 1 if config.reduction == "shared" else self.parts
        self.reductions = nn.ModuleList(PartReduction(channels, dim) for _ in range(count))
        self.classifiers = nn.ModuleList(small_classifier(dim, config.num_classes) for _ in range(self.parts))
        self.reduces = config.embedding == "h"
        self.embedding_dim, self.normalised = self.parts * (dim if self.reduces else channels), True
        self.l2_normalize = L2Normalize()

    @classmethod
    def check_map(cls, config: ModelConfig, rows: int, columns: int, crops: str) -> None:
        """Raises InvalidValue for parts that would be stripes of different heights."""
        if rows % config.parts:
            fitting = one_of(str(parts) for parts in range(1, rows + 1) if rows % parts == 0)
            expected = f"{fitting}, which divide the {rows} rows of the map of {crops} crops"
            raise InvalidValue("--parts", config.parts, expected)

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput:
        """As `pmm.models.multi_branch.MultiBranchNet.forward`; `pids` only choose training, whose output has no
        features."""
        maps = self.backbone(images)
        if pids is None:
            return self.l2_normalize(self.tail()(maps))
        pooled, figures = self.train_pool(maps, generator)
        features = per_part(drop(pooled, self.dropout, generator), self.reductions)
        pairs = zip(self.classifiers, features.unbind(2), strict=True)
        return TrainOutput((), tuple(classifier(feature) for classifier, feature in pairs), figures=figures)

    def train_pool(self, maps: Tensor, generator: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `pooling`, in training, and `TrainOutput.figures`."""
        return self.stripes(maps), {}

    def pooling(self) -> nn.Module:
        """Maps [N, C, h, w] -> what the parts see [N, C, p]."""
        return self.stripes

    def tail(self) -> nn.Module:
        """Maps [N, C, h, w] -> the parts' vectors of norm 1, concatenated [N, D]."""
        convs = [cast(PartReduction, reduction).conv for reduction in self.reductions] if self.reduces else []
        return _PartTail(self.pooling(), convs)

    def evidence(self, images: Tensor) -> list[Evidence]:
        maps = leaf(self.backbone(images))
        features = per_part(self.pooling()(maps), self.reductions).unbind(2)
        seen = self.cell_shares(maps.detach()).unbind(1)
        return [
            Evidence(f"part {part} of {self.parts}", maps, classifier(feature), shares=shares)
            for part, (classifier, feature, shares) in enumerate(
                zip(self.classifiers, features, seen, strict=True), start=1
            )
        ]

    def cell_shares(self, maps: Tensor) -> Tensor:
        """The shares [N, p, h, w] of each cell of maps [N, C, h, w] that belong to each part: 1 in its stripe."""
        count, _, rows, columns = maps.shape
        stripes = torch.eye(self.parts, dtype=maps.dtype, device=maps.device)
        return stripes.repeat_interleave(rows // self.parts, 1)[None, :, :, None].expand(count, -1, -1, columns)

    def deployed(self) -> InferenceModel:
        """The test-time network: without classifiers."""
        return InferenceModel(OneMap(self.backbone), self.tail(), normalised=True)


def small_classifier(features: int, classes: int) -> nn.Linear:
    """A classifier whose logits are all about 0 at first."""
    classifier = nn.Linear(features, classes)
    nn.init.normal_(classifier.weight, std=0.001)
    nn.init.zeros_(classifier.bias)
    return classifier


class StripeMeans(nn.Module):
    """Maps [N, C, h, w] -> the means [N, C, p] over p stripes of h / p rows."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, maps: Tensor) -> Tensor:
        _, _, rows, columns = maps.shape
        return F.avg_pool2d(maps, (rows // self.parts, columns)).flatten(2)


class _PartTail(nn.Module):
    """Maps -> parts -> by `convs`, one for all parts, one for each or none -> vectors of norm 1, concatenated.

    The convolutions see single cells: as products of matrices they give the same, and in 8 bits OpenCV 5.0 computes
    these correctly and convolutions of so few cells wrongly, without a word.
    """

    def __init__(self, pooling: nn.Module, convs: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pooling, self.l2_normalize = pooling, L2Normalize()
        self.linears = nn.ModuleList(_as_linear(cast(nn.Conv1d, conv)) for conv in convs)

    def forward(self, maps: Tensor) -> Tensor:
        vectors = self.pooling(maps).transpose(1, 2)
        _, parts, channels = vectors.shape
        if len(self.linears) == 1:
            vectors = self.linears[0](vectors.reshape(-1, channels))
        elif len(self.linears):
            pairs = zip(self.linears, vectors.unbind(1), strict=True)
            vectors = torch.stack([linear(vector) for linear, vector in pairs], 1)
        dim = vectors.shape[-1]
        return self.l2_normalize(vectors.reshape(-1, dim)).reshape(-1, parts * dim)


def _as_linear(conv: nn.Conv1d) -> nn.Linear:
    """Of the same weights, in the same memory."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=False, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach()[..., 0], requires_grad=False)
    return linear


def per_part(pooled: Tensor, layers: Sequence[nn.Module] | nn.ModuleList) -> Tensor:
    """Parts [N, C, p] -> [N, F, p], by the one layer of all parts or by each part's own."""
    if len(layers) == 1:
        return layers[0](pooled)
    return torch.cat([layer(part) for layer, part in zip(layers, pooled.split(1, 2), strict=True)], 2)
