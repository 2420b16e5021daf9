"""CAMA: Class Activation Maps Augmentation (Yang, Huang, Zhang, Chen, Huang, Zhang; CVPR 2019), in our reading.

The paper's formulas were not at hand: the network and the penalty are put together from a summary of the paper, from a
later toolkit of its first author (github.com/DeepAlchemist/differentiable-categorical-region) and from others' code.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pmm.config import BACKBONE_NAMES, TIMM, ModelConfig
from pmm.models.backbone import Backbone, ResNetBackbone, build_backbone
from pmm.models.output import Evidence, InferenceModel, L2Normalize, ReidModel, TrainOutput, leaf
from pmm.utils.errors import InvalidValue

ACTIVE = 0.3
"""Share of the cells that a branch is said to attend to."""


class BranchedBackbone(Backbone):
    """A ResNet with several copies of its last layer: images -> a map of each branch, all [N, C, h, w]."""

    def __init__(self, backbone: ResNetBackbone, branches: int) -> None:
        super().__init__()
        self.channels, self.stride = backbone.channels, backbone.stride
        self.trunk, self.layer4 = backbone.trunk, backbone.layer4
        self.branches = nn.ModuleList(copy.deepcopy(backbone.layer4) for _ in range(branches - 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shared = self.trunk(images)
        return tuple(layer(shared) for layer in (self.layer4, *self.branches))

    def copy_layer4(self, loaded: Container[str]) -> set[str]:
        """Begin each branch with the weights of the first, but for those whose names in the model are among the
        `loaded`. Returns the names of the copies."""
        copies = set()
        for place, branch in enumerate(self.branches):
            names = [f"backbone.branches.{place}.{name}" for name in branch.state_dict()]
            if names[0] not in loaded:
                branch.load_state_dict(self.layer4.state_dict())
                copies |= set(names)
        return copies


class CAMA(ReidModel):
    """Branches with a classifier each; a penalty makes each attend to cells that the branches before it do not.

    A branch: its map's average, a BN-neck whose bias stays 0, a classifier without a bias. The embedding is what the
    necks give, each of norm 1, concatenated and divided by the square root of their number.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        backbone = cast(ResNetBackbone, build_backbone(config.backbone, config.last_stride))
        self.backbone = BranchedBackbone(backbone, config.branches)
        channels = self.backbone.channels
        self.necks = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(config.branches))
        self.classifiers = nn.ModuleList(
            nn.Linear(channels, config.num_classes, bias=False) for _ in range(config.branches)
        )
        for neck, classifier in zip(self.necks, self.classifiers, strict=True):
            neck.bias.requires_grad_(False)
            nn.init.normal_(cast(nn.Linear, classifier).weight, std=0.001)
        self.penalty = config.penalty
        self.embedding_dim, self.normalised = channels * config.branches, True
        self.l2_normalize = L2Normalize()

    @classmethod
    def check_map(cls, config: ModelConfig, rows: int, columns: int, crops: str) -> None:
        """Raises InvalidValue for a backbone whose last layer cannot be told from the others."""
        if config.backbone.startswith(TIMM):
            hint = "--method cama copies the last layer of a ResNet"
            raise InvalidValue("--backbone", config.backbone, choices=BACKBONE_NAMES, hint=hint)

    def weights_loaded(self, names: Container[str]) -> set[str]:
        return self.backbone.copy_layer4(names)

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput:
        """As `pmm.models.multi_branch.MultiBranchNet.forward`; training has no features, and its penalty is `overlap`.

        Nothing in it is random.
        """
        maps = self.backbone(images)
        if pids is None:
            return self.l2_normalize(self.tail()(*maps))
        features = [neck(one.mean((2, 3))) for neck, one in zip(self.necks, maps, strict=True)]
        logits = tuple(classifier(f) for classifier, f in zip(self.classifiers, features, strict=True))
        if not self.penalty:
            return TrainOutput((), logits)
        penalty = self.penalty * overlap(self.cams(maps, pids))
        return TrainOutput((), logits, penalties={"overlap": penalty})

    def cams(self, maps: Sequence[Tensor], pids: Tensor) -> list[Tensor]:
        """The evidence [N, h, w] for the classes `pids` [N] in the cells of each branch's map, float32, with
        gradients.

        The classifier's weights times the map as it is, without ReLU: the mean over the cells is the logit of a
        branch without a neck.
        """
        return [
            class_evidence(one, cast(nn.Linear, classifier).weight[pids])
            for one, classifier in zip(maps, self.classifiers, strict=True)
        ]

    def evidence(self, images: Tensor) -> list[Evidence]:
        """With the class activation maps of the paper, which pass the neck by."""
        found = []
        for place, one in enumerate(self.backbone(images)):
            maps, classifier = leaf(one), cast(nn.Linear, self.classifiers[place])
            logits = classifier(self.necks[place](maps.mean((2, 3))))
            found.append(Evidence(f"branch {place + 1}", maps, logits, classifier.weight))
        return found

    def tail(self) -> nn.Module:
        """The maps -> the branches' vectors of norm 1, concatenated [N, D]."""
        return _BranchTail(self.necks)

    def deployed(self) -> InferenceModel:
        """The test-time network: without classifiers."""
        return InferenceModel(_Maps(self.backbone), self.tail(), normalised=True)


def class_evidence(maps: Tensor, weights: Tensor) -> Tensor:
    """sum_c weights[n, c] maps[n, c] in each cell: [N, h, w], in at least float32."""
    with torch.autocast(maps.device.type, enabled=False):
        wide = torch.promote_types(maps.dtype, torch.float32)
        return torch.einsum("nc,nchw->nhw", weights.to(wide), maps.to(wide))


def overlap(cams: Sequence[Tensor]) -> Tensor:
    """The mean, over pairs of branches, samples and cells, of the product of the soft masks of two maps [N, h, w].

    The earlier branch of a pair gets no gradient: the later one gives way.
    """
    masks = [soft_mask(cam) for cam in cams]
    pairs = [(masks[a].detach() * masks[b]).mean() for b in range(len(masks)) for a in range(b)]
    return torch.stack(pairs).mean()


def soft_mask(cam: Tensor) -> Tensor:
    """Near 1 in the most active 30 % of the cells [N, h, w], near 0 elsewhere: sigmoid(cam - t) [N, h * w].

    t is the k-th largest value of a map, k = floor(0.3 h w), with its gradient: a constant added to a map changes
    nothing. The (k+1)-th would lie in the background of a map that is saturated, where each mask would be 0.5.
    """
    cells = cam.flatten(1)
    threshold = cells.topk(max(1, int(ACTIVE * cells.shape[1])), 1).values[:, -1:]
    return (cells - threshold).sigmoid()


class _Maps(nn.Module):
    """images -> the maps."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(images)


class _BranchTail(nn.Module):
    """The maps -> the branches' vectors of norm 1, concatenated."""

    def __init__(self, necks: nn.ModuleList) -> None:
        super().__init__()
        self.necks, self.l2_normalize = necks, L2Normalize()

    def forward(self, *maps: Tensor) -> Tensor:
        pairs = zip(self.necks, maps, strict=True)
        return torch.cat([self.l2_normalize(neck(one.mean((2, 3)))) for neck, one in pairs], 1)
