"""Losses of the paper's recipe: batch-hard soft-margin triplet and label-smoothed cross-entropy, summed over stages."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.models.output import MixedLabels, TrainOutput


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


def cross_entropy(logits: Tensor, pids: Tensor, mixed: MixedLabels | None, *, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of logits [N, K], in at least float32; of mixed labels l CE(y) + (1 - l) CE(y_j)."""
    wide = _wide(logits)
    if mixed is None:
        return F.cross_entropy(wide, pids, label_smoothing=label_smoothing)
    own, other = (
        F.cross_entropy(wide, labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (pids, mixed.other)
    )
    return (mixed.own * own + (1 - mixed.own) * other).mean()


def reid_losses(
    output: TrainOutput, pids: Tensor, *, label_smoothing: float, rows: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Scalars `triplet1`, `cross_entropy1`, `triplet2`, ... per stage; their sum is the training loss.

    Where a stage's labels are mixed its cross-entropy is; the triplet loss keeps the anchors' labels. `rows` turns rows
    of this process's part of a batch into those of the whole batch, in which the triplets are then found
    (`pmm.training.distributed.Processes.rows`).
    """
    losses = {}
    mixed = output.mixed or (None,) * len(output.features)
    others: tuple[Tensor | None, ...] = (None,) * len(output.features)
    other_pids = None
    if rows is not None:  # in one go: processes must agree on the order of what they exchange
        together = rows(torch.cat([_wide(feature) for feature in output.features], 1))
        others = together.split([feature.shape[1] for feature in output.features], 1)
        other_pids = rows(pids)
    stages = zip(output.features, output.logits, mixed, others, strict=True)
    for stage, (feature, logits, mix, beside) in enumerate(stages, start=1):
        losses[f"triplet{stage}"] = batch_hard_triplet(feature, pids, beside, other_pids)
        losses[f"cross_entropy{stage}"] = cross_entropy(logits, pids, mix, label_smoothing=label_smoothing)
    return losses
