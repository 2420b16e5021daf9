"""Losses of the paper's recipe: batch-hard soft-margin triplet and label-smoothed cross-entropy, summed over stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.models.output import TrainOutput


def pairwise_distances(features: Tensor) -> Tensor:
    """Euclidean distances [N, N] of features [N, F]: sqrt(clamp(d2, 1e-12)), in at least float32."""
    with torch.autocast(features.device.type, enabled=False):
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        squares = wide.square().sum(1)
        d2 = squares[:, None] + squares[None, :] - 2 * wide @ wide.T
        return d2.clamp(min=1e-12).sqrt()


def batch_hard_triplet(features: Tensor, pids: Tensor) -> Tensor:
    """Mean of softplus(hardest positive - hardest negative) over anchors [N, F]; the anchor is among its positives.

    Soft-margin batch-hard triplet loss of Hermans, Beyer, Leibe (2017), on unnormalised features. An anchor without any
    negative in the batch has no triplet: `inf` distance to its nearest negative, loss 0.
    """
    distances = pairwise_distances(features)
    same = pids[:, None] == pids[None, :]
    hardest_positive = distances.masked_fill(~same, -torch.inf).amax(1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.softplus(hardest_positive - hardest_negative).mean()


def reid_losses(output: TrainOutput, pids: Tensor, *, label_smoothing: float) -> dict[str, Tensor]:
    """Scalars `triplet1`, `cross_entropy1`, `triplet2`, ... per stage; their sum is the training loss."""
    losses = {}
    for stage, (feature, logits) in enumerate(zip(output.features, output.logits, strict=True), start=1):
        losses[f"triplet{stage}"] = batch_hard_triplet(feature, pids)
        losses[f"cross_entropy{stage}"] = F.cross_entropy(logits.float(), pids, label_smoothing=label_smoothing)
    return losses
