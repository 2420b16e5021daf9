"""Losses: batch-hard soft-margin triplet and label-smoothed cross-entropy, summed over stages, and penalties."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.models.output import MixedLabels, TrainOutput


def pairwise_distances(features: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Euclidean distances [N, M] of features [N, F] to candidates [M, F] (None: each other): sqrt(clamp(d2, 1e-12)),
    in at least float32."""
    with torch.autocast(features.device.type, enabled=False):
        wide = _wide(features)
        columns = wide if candidates is None else _wide(candidates)
        d2 = wide.square().sum(1)[:, None] + columns.square().sum(1)[None, :] - 2 * wide @ columns.T
        return d2.clamp(min=1e-12).sqrt()


def _wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def batch_hard_triplet(
    features: Tensor, pids: Tensor, candidates: Tensor | None = None, candidate_pids: Tensor | None = None
) -> Tensor:
    """Mean of softplus(hardest positive - hardest negative) over anchors [N, F]; the anchor is among its positives.

    Positives and negatives come from candidates [M, F] with candidate_pids [M], which include the anchors (None: the
    anchors alone).

    Soft-margin batch-hard triplet loss of Hermans, Beyer, Leibe (2017), on unnormalised features. An anchor without any
    negative in the batch has no triplet: distance `inf` to its nearest negative, loss 0.
    """
    distances = pairwise_distances(features, candidates)
    same = pids[:, None] == (pids if candidate_pids is None else candidate_pids)[None, :]
    hardest_positive = distances.masked_fill(~same, -torch.inf).amax(1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.softplus(hardest_positive - hardest_negative).mean()


def cross_entropy(logits: Tensor, pids: Tensor, mixed: MixedLabels | None, *, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of logits [N, K], in at least float32; of mixed labels l CE(y) + (1 - l) CE(y_j)."""
    wide = _wide(logits)
    if mixed is None:
        return F.cross_entropy(wide, pids, label_smoothing=label_smoothing)
    anchor, partner = (
        F.cross_entropy(wide, labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (pids, mixed.partner_pids)
    )
    return (mixed.anchor_share * anchor + (1 - mixed.anchor_share) * partner).mean()


def reid_losses(
    output: TrainOutput, pids: Tensor, *, label_smoothing: float, gather_rows: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Scalars `triplet1`, `cross_entropy1`, `triplet2`, ... per stage, and the penalties; their sum is the loss.

    A method without features has no triplet loss. Mixed labels change a stage's cross-entropy; the triplet loss keeps
    the anchors' labels. With `gather_rows` (`pmm.training.distributed.Processes.gather_rows`) triplets are searched in
    the batch of all processes.
    """
    triplets = _triplet_losses(output.features, pids, gather_rows)
    losses = {}
    mixed = output.mixed or (None,) * len(output.logits)
    for stage, (logits, mix) in enumerate(zip(output.logits, mixed, strict=True), start=1):
        if triplets:
            losses[f"triplet{stage}"] = triplets[stage - 1]
        losses[f"cross_entropy{stage}"] = cross_entropy(logits, pids, mix, label_smoothing=label_smoothing)
    return losses | dict(output.penalties)


def _triplet_losses(
    features: tuple[Tensor, ...], pids: Tensor, gather_rows: Callable[[Tensor], Tensor] | None
) -> list[Tensor]:
    """Of each stage."""
    if not features:
        return []
    candidates: tuple[Tensor | None, ...] = (None,) * len(features)
    candidate_pids = None
    if gather_rows is not None:  # one exchange for all stages: processes must exchange in the same order
        gathered = gather_rows(torch.cat([_wide(feature) for feature in features], 1))
        candidates = gathered.split([feature.shape[1] for feature in features], 1)
        candidate_pids = gather_rows(pids)
    pairs = zip(features, candidates, strict=True)
    return [batch_hard_triplet(feature, pids, rows, candidate_pids) for feature, rows in pairs]
