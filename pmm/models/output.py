"""What a model returns in training, and what it leaves for deployment."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class MixedLabels(NamedTuple):
    """The two identities in each map of a stage: the anchor by `anchor_share` [N] float, its partner by the rest."""

    partner_pids: Tensor
    """Class index [N] of the partner."""
    anchor_share: Tensor


class TrainOutput(NamedTuple):
    """Per stage: the features [N, F] the triplet loss sees, the identity logits [N, K] and how its labels are mixed.

    None for a stage whose label is the anchor's alone; `mixed` may be empty if that holds for all.
    """

    features: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    mixed: tuple[MixedLabels | None, ...] = ()


class UnitLength(nn.Module):
    """Embeddings [N, D] to length 1, in which the Euclidean ranking is the cosine's; an embedding of zeros stays."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings)


class Mix(NamedTuple):
    """One Hard-Mix of a batch: what guided it, what it took from whom, and what the stage after it sees."""

    cam: Tensor
    """Class activation map of the stage before [N, h, w], float32."""
    partner: Tensor
    """Index of each sample's partner [N]."""
    replaced: Tensor
    """Cells taken from the partner [N, h, w] bool."""
    pooled: Tensor
    """Global maxima of the mixed map [N, C]."""


class InferenceModel(nn.Module):
    """A test-time network in two parts, so that an export can run the expensive one in another precision.

    `trunk` maps normalised images [N, 3, H, W] to a tuple of maps; `tail` pools them into features [N, D] and `finish`
    makes the embedding of those, bringing it to length 1 if `normalised`; both always run in fp32.
    """

    def __init__(self, trunk: nn.Module, tail: nn.Module, *, normalised: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.tail = tail
        self.finish = UnitLength() if normalised else nn.Identity()
        self.normalised = normalised

    def forward(self, images: Tensor) -> Tensor:
        return self.finish(self.tail(*self.trunk(images)))
