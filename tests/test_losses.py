import math

import pytest
import torch
from torch.autograd import gradcheck

from pmm.losses import batch_hard_triplet, pairwise_distances, reid_losses
from pmm.models.output import TrainOutput


def triplet_by_hand(features, pids):
    losses = []
    for a in range(len(pids)):
        distances = [math.sqrt(max(float((features[a] - f).square().sum()), 1e-12)) for f in features]
        positive = max(d for d, p in zip(distances, pids, strict=True) if p == pids[a])
        negative = min(d for d, p in zip(distances, pids, strict=True) if p != pids[a])
        losses.append(math.log1p(math.exp(positive - negative)))
    return sum(losses) / len(losses)


def test_triplet_by_hand():
    torch.manual_seed(0)
    features, pids = torch.randn(8, 5, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    assert batch_hard_triplet(features, pids).item() == pytest.approx(
        triplet_by_hand(features, pids.tolist()), rel=1e-9
    )


def test_triplet_of_one_point_is_ln_2_and_has_a_finite_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    loss = batch_hard_triplet(features, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert features.grad.isfinite().all()


def test_gradcheck():
    torch.manual_seed(0)
    features = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda f: batch_hard_triplet(f, torch.tensor([0, 0, 1, 1, 2, 2])), features)


def test_distances_do_not_overflow_in_half_precision():
    features = torch.tensor([[300.0, 0], [0, 300.0]], dtype=torch.float16)
    assert pairwise_distances(features)[0, 1].item() == pytest.approx(300 * math.sqrt(2), rel=1e-6)


def test_losses_of_each_stage_with_label_smoothing():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]])
    pids = torch.tensor([0, 1])
    output = TrainOutput(features=(torch.randn(2, 4), torch.randn(2, 4)), logits=(logits, logits * 2))
    losses = reid_losses(output, pids, label_smoothing=0.1)
    assert list(losses) == ["triplet1", "cross_entropy1", "triplet2", "cross_entropy2"]
    target = torch.full((2, 3), 0.1 / 3)
    target[torch.arange(2), pids] += 0.9
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert losses["cross_entropy1"].item() == pytest.approx(expected.item(), rel=1e-6)
