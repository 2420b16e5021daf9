"""A model's output in training, and the network that is deployed."""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmm.config import ModelConfig
from pmm.models.fold_batchnorm import fold_batch_norms
from pmm.utils.errors import UserError


class MixedLabels(NamedTuple):
    """The two identities in each map of a stage: the anchor by `anchor_share` [N] float, its partner by the rest."""

    partner_pids: Tensor
    """Class index [N] of the partner."""
    anchor_share: Tensor


class TrainOutput(NamedTuple):
    """Per stage: the features [N, F] for the triplet loss, the identity logits [N, K] and how its labels are mixed.

    `features` is empty for a method without triplet loss. `mixed` is None for a stage whose labels are the anchors',
    and may be empty if that holds for all. `penalties`, scalars by name, are added to the loss; `figures`, scalars by
    name, are only recorded.
    """

    features: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    mixed: tuple[MixedLabels | None, ...] = ()
    penalties: Mapping[str, Tensor] = MappingProxyType({})
    figures: Mapping[str, Tensor] = MappingProxyType({})


class Evidence(NamedTuple):
    """A classifier of a model, and the map that it looks at, at test time."""

    name: str
    """Of the classifier, and on a second line of what it is fed."""
    maps: Tensor
    """[N, C, h, w], the leaf of a graph that ends in the logits."""
    logits: Tensor
    """[N, K]"""
    weights: Tensor | None = None
    """[K, C], where the evidence for a class is a sum of the map by these weights, not by Grad-CAM's."""
    shares: Tensor | None = None
    """[N, h, w] in 0..1, of each cell that the classifier sees; None for the whole of all."""


def leaf(maps: Tensor) -> Tensor:
    """The map [N, C, h, w] as the leaf of a new graph."""
    return maps.detach().requires_grad_()


def drop(values: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Dropout, drawn with `generator` (None: torch's default): each value is 0 with that probability, else larger."""
    kept = torch.rand(values.shape, generator=generator, device=values.device) >= probability
    return values * kept / (1 - probability)


class L2Normalize(nn.Module):
    """Embeddings [N, D] to norm 1, so that Euclidean ranking is cosine ranking; an embedding of zeros stays."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings)


class Mix(NamedTuple):
    """One Hard-Mix of a batch."""

    cam: Tensor
    """Class activation map of the previous stage [N, h, w], float32, which selects the cells."""
    partner: Tensor
    """Index of each sample's partner [N]."""
    replaced: Tensor
    """Cells taken from the partner [N, h, w] bool."""
    pooled: Tensor
    """Global maxima of the mixed map [N, C], which the next stage sees."""


class InferenceModel(nn.Module):
    """A test-time network in two parts, so that an export can run the expensive one in another precision.

    `trunk` maps normalised images [N, 3, H, W] to a tuple of maps; `tail` pools them into features [N, D], and
    `l2_normalize` makes embeddings of those, of norm 1 if `normalised` (else it is the identity); both run in fp32.
    """

    input_type = torch.float32
    """Type in which the trunk takes its images."""

    def __init__(self, trunk: nn.Module, tail: nn.Module, *, normalised: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.tail = tail
        self.l2_normalize = L2Normalize() if normalised else nn.Identity()
        self.normalised = normalised

    def forward(self, images: Tensor) -> Tensor:
        return self.l2_normalize(self.tail(*self.trunk(images)))

    def fold_batch_norms(self, example: Tensor) -> None:
        """Fold what follows a layer into it, in fp32; `example` is what the network takes."""
        fold_batch_norms(self, example)

    def cast(self, dtype: torch.dtype) -> None:
        """Let the trunk compute in `dtype`."""
        self.trunk.to(dtype)
        self.input_type = dtype

    def reverse_channels(self, images: Tensor) -> None:
        """Make the convolutions that read the images, as `images`, take BGR: no channel is moved when the network runs.

        Raises UserError for a network that does something else with them first.
        """
        readers: list[nn.Module] = []

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is images and not isinstance(module, nn.Identity):
                readers.append(module)

        hooks = [m.register_forward_pre_hook(before) for m in self.trunk.modules() if not list(m.children())]
        try:
            with torch.no_grad():
                self.trunk(images)
        finally:
            for hook in hooks:
                hook.remove()
        if not readers or not all(isinstance(module, nn.Conv2d) for module in readers):
            problem = "this network's first step is no convolution, which alone can take BGR"
            raise UserError(problem, hint="leave --input-colour out")
        for module in readers:
            module.weight = nn.Parameter(module.weight.detach().flip(1).contiguous(), requires_grad=False)  # type: ignore[operator]


class EmbeddingModel(nn.Module):
    """Normalised images [N, 3, H, W] -> embeddings [N, D], in eval mode."""

    embedding_dim: int
    """D of its embeddings [N, D]."""
    normalised: bool
    """Whether they have norm 1."""

    def merge_branches(self) -> None:
        """Make one layer of parallel ones that only training needs; the network is in eval mode."""

    def deployed(self) -> InferenceModel:
        """The test-time network, which shares its weights."""
        raise NotImplementedError


class ReidModel(EmbeddingModel):
    """What the model of every method is; see `pmm.models.multi_branch.MultiBranchNet.forward` for shapes."""

    @classmethod
    def check_map(cls, config: ModelConfig, rows: int, columns: int, crops: str) -> None:
        """Raises InvalidValue for a network that cannot be made for a map of so many cells, of `crops` (as 384x128)."""

    def weights_loaded(self, names: Container[str]) -> set[str]:
        """Called when initial weights of those `names` were loaded; the others are random. Returns the names of the
        weights that were filled with copies."""
        return set()

    def start_phase(self, name: str) -> None:
        """Called when the phase `name` begins or is resumed, and before a model of that phase is evaluated."""

    def evidence(self, images: Tensor) -> list[Evidence]:
        """Each classifier's answer to normalised images [N, 3, H, W], and what it looks at; in eval mode, with
        gradients enabled."""
        raise NotImplementedError

    def part_shares(self, images: Tensor) -> Tensor | None:
        """The shares [N, p, h, w] of each cell of the map that belong to each part; None without such parts."""
        return None

    def merge_branches(self) -> None:
        self.backbone.merge_branches()  # type: ignore[operator, union-attr]
