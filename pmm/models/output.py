"""What a model returns in training."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TrainOutput(NamedTuple):
    """Per stage: the features [N, F] the triplet loss sees and the identity logits [N, K]."""

    features: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
