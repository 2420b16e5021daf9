"""What a model returns in training, and what it leaves for deployment."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class TrainOutput(NamedTuple):
    """Per stage: the features [N, F] the triplet loss sees and the identity logits [N, K]."""

    features: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


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


class Deployed(nn.Module):
    """A test-time network in two parts, so that an export can run the expensive one in another precision.

    `trunk` maps normalised images [N, 3, H, W] to a tuple of maps; `tail` pools them into the embedding [N, D] and
    always runs in fp32.
    """

    def __init__(self, trunk: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.tail = tail

    def forward(self, images: Tensor) -> Tensor:
        return self.tail(*self.trunk(images))
