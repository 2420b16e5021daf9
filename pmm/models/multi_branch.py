"""Shared by all methods but the baseline: two maps of one backbone, a head per stage, and the test-time network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from pmm.config import ModelConfig
from pmm.models.backbone import build_backbone
from pmm.models.output import Evidence, InferenceModel, L2Normalize, MixedLabels, ReidModel, TrainOutput, leaf
from pmm.models.stages import Head

NUMERALS = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")


class MultiBranchNet(ReidModel):
    """F1 = backbone, X = extra bottleneck of F1. The first stage pools F1 by average, the others X by maximum.

    Methods differ in how the other stages see X in training: see `train_stages`.
    """

    def __init__(self, config: ModelConfig, feature_dims: Sequence[int]) -> None:
        """`feature_dims`: dimension of each stage's feature; the embedding is all of them."""
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.last_stride)
        channels = self.backbone.channels
        self.bottleneck = Bottleneck(channels, channels // Bottleneck.expansion)
        self.stages = nn.ModuleList(
            Head(channels, dim, config.num_classes, fan="fan_out" if stage else "fan_in", neck=config.neck == "bn")
            for stage, dim in enumerate(feature_dims)
        )
        self.embedding_dim, self.normalised = sum(feature_dims), config.metric == "cosine"
        self.l2_normalize = L2Normalize() if self.normalised else nn.Identity()

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput:
        """images [N, 3, H, W], normalised.

        Without `pids`: the embedding [N, embedding_dim], of norm 1 if `normalised`. With `pids` [N] (class indices):
        features and logits of the stages as in training; `generator` draws all random numbers of the method.
        """
        f1 = self.backbone(images)
        x = self.bottleneck(f1)
        average = f1.mean((2, 3))
        if pids is not None:
            return self.train_stages(f1, x, average, pids, generator)
        first, *others = self.stages
        largest = x.amax((2, 3))
        features = [first.feature(average), *(head.feature(largest) for head in others)]  # type: ignore[operator]
        return self.l2_normalize(torch.cat(features, 1))

    def evidence(self, images: Tensor) -> list[Evidence]:
        f1 = leaf(self.backbone(images))
        x = leaf(self.bottleneck(f1))
        first, *others = self.stages
        found = [Evidence("stage I\naverage of F1", f1, first(f1.mean((2, 3)))[1])]
        names = (f"stage {number}\nmaximum of X" for number in NUMERALS[1:])
        return found + [Evidence(name, x, head(x.amax((2, 3)))[1]) for name, head in zip(names, others, strict=False)]

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """The stages' features and logits in training, of F1 and X [N, C, h, w] and F1's average [N, C]."""
        raise NotImplementedError

    def heads(self, *pooled: Tensor, mixed: tuple[MixedLabels | None, ...] = ()) -> TrainOutput:
        """A pooled vector [N, C] per stage -> its feature and logits; `mixed` as in `TrainOutput`."""
        outputs = [head(vector) for head, vector in zip(self.stages, pooled, strict=True)]
        return TrainOutput(tuple(f for f, _ in outputs), tuple(z for _, z in outputs), mixed)

    def deployed(self) -> InferenceModel:
        """The test-time network: all stages but the first read the same vector, so their reductions are one layer."""
        maps, tail = _TwoMaps(self.backbone, self.bottleneck), _StagesTail(*self.stages)
        return InferenceModel(maps, tail, normalised=self.normalised)


class _TwoMaps(nn.Module):
    """images -> (F1, X)."""

    def __init__(self, backbone: nn.Module, bottleneck: nn.Module) -> None:
        super().__init__()
        self.backbone, self.bottleneck = backbone, bottleneck

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        f1 = self.backbone(images)
        return f1, self.bottleneck(f1)


class _StagesTail(nn.Module):
    """(F1, X) -> the embedding of all stages."""

    def __init__(self, first: Head, *others: Head) -> None:
        super().__init__()
        self.average_head = nn.Sequential(first.reduction, first.bn)
        linear, bn = [head.reduction for head in others], [head.bn for head in others]
        self.max_head = nn.Sequential(_stack_linear(linear), _stack_bn(bn))
        self.activation = first.activation

    def forward(self, f1: Tensor, x: Tensor) -> Tensor:
        return self.activation(torch.cat([self.average_head(f1.mean((2, 3))), self.max_head(x.amax((2, 3)))], 1))


def _stack_linear(layers: Sequence[nn.Linear]) -> nn.Linear:
    like, rows = layers[0].weight, sum(layer.out_features for layer in layers)
    stacked = nn.Linear(like.shape[1], rows, device=like.device, dtype=like.dtype)
    stacked.load_state_dict(_stack(layers))
    return stacked


def _stack_bn(norms: Sequence[nn.BatchNorm1d]) -> nn.BatchNorm1d:
    like, eps, rows = norms[0].weight, norms[0].eps, sum(norm.num_features for norm in norms)
    stacked = nn.BatchNorm1d(rows, eps=eps, device=like.device, dtype=like.dtype)
    stacked.load_state_dict(_stack(norms))
    return stacked.train(norms[0].training)


def _stack(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """One state dict, row under row; of numbers without rows (batch-norm's counter) the first module's."""
    states = [module.state_dict() for module in modules]
    return {key: torch.cat([s[key] for s in states]) if value.dim() else value for key, value in states[0].items()}
