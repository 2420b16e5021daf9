"""Losses of the paper's recipe: batch-hard soft-margin triplet and label-smoothed cross-entropy, summed over stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.models.output import MixedLabels, TrainOutput


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


def cross_entropy(logits: Tensor, pids: Tensor, mixed: MixedLabels | None, *, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of logits [N, K], in at least float32; of mixed labels l CE(y) + (1 - l) CE(y_j)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mixed is None:
        return F.cross_entropy(wide, pids, label_smoothing=label_smoothing)
    own, other = (
        F.cross_entropy(wide, labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (pids, mixed.other)
    )
    return (mixed.own * own + (1 - mixed.own) * other).mean()


def reid_losses(output: TrainOutput, pids: Tensor, *, label_smoothing: float) -> dict[str, Tensor]:
    """Scalars `triplet1`, `cross_entropy1`, `triplet2`, ... per stage; their sum is the training loss.

    Where a stage's labels are mixed its cross-entropy is; the triplet loss keeps the anchors' labels.
    """
    losses = {}
    mixed = output.mixed or (None,) * len(output.features)
    for stage, (feature, logits, mix) in enumerate(zip(output.features, output.logits, mixed, strict=True), start=1):
        losses[f"triplet{stage}"] = batch_hard_triplet(feature, pids)
        losses[f"cross_entropy{stage}"] = cross_entropy(logits, pids, mix, label_smoothing=label_smoothing)
    return losses
