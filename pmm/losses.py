"""Losses of the paper's recipe: batch-hard soft-margin triplet and label-smoothed cross-entropy, summed over stages."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.models.output import TrainOutput


def pairwise_distances(features: Tensor, others: Tensor | None = None) -> Tensor:
    """Euclidean distances [N, M] of features [N, F] to others [M, F] (None: each other): sqrt(clamp(d2, 1e-12)), in at
    least float32."""
    with torch.autocast(features.device.type, enabled=False):
        wide = _wide(features)
        beside = wide if others is None else _wide(others)
        d2 = wide.square().sum(1)[:, None] + beside.square().sum(1)[None, :] - 2 * wide @ beside.T
        return d2.clamp(min=1e-12).sqrt()


def _wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def batch_hard_triplet(
    features: Tensor, pids: Tensor, others: Tensor | None = None, other_pids: Tensor | None = None
) -> Tensor:
    """Mean of softplus(hardest positive - hardest negative) over anchors [N, F]; the anchor is among its positives.

    Positives and negatives are found among others [M, F] with other_pids [M], which hold the anchors too (None: the
    anchors alone).

    Soft-margin batch-hard triplet loss of Hermans, Beyer, Leibe (2017), on unnormalised features. An anchor without any
    negative in the batch has no triplet: `inf` distance to its nearest negative, loss 0.
    """
    distances = pairwise_distances(features, others)
    same = pids[:, None] == (pids if other_pids is None else other_pids)[None, :]
    hardest_positive = distances.masked_fill(~same, -torch.inf).amax(1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.softplus(hardest_positive - hardest_negative).mean()


def reid_losses(
    output: TrainOutput, pids: Tensor, *, label_smoothing: float, rows: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Scalars `triplet1`, `cross_entropy1`, `triplet2`, ... per stage; their sum is the training loss.

    `rows` turns rows of this process's part of a batch into those of the whole batch, in which the triplets are then
    found (`pmm.processes.Processes.rows`).
    """
    losses = {}
    others: tuple[Tensor | None, ...] = (None,) * len(output.features)
    other_pids = None
    if rows is not None:  # in one go: processes must agree on the order of what they exchange
        together = rows(torch.cat([_wide(feature) for feature in output.features], 1))
        others = together.split([feature.shape[1] for feature in output.features], 1)
        other_pids = rows(pids)
    for stage, (feature, logits) in enumerate(zip(output.features, output.logits, strict=True), start=1):
        losses[f"triplet{stage}"] = batch_hard_triplet(feature, pids, others[stage - 1], other_pids)
        losses[f"cross_entropy{stage}"] = F.cross_entropy(logits.float(), pids, label_smoothing=label_smoothing)
    return losses
