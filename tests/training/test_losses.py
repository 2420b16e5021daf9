import math

import pytest
import torch
from torch.autograd import gradcheck

from pmm.models.output import MixedLabels, TrainOutput
from pmm.training.losses import batch_hard_triplet, cross_entropy, pairwise_distances, reid_losses


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


def entropy_by_hand(logits, label, smoothing):
    target = [smoothing / len(logits) + (1 - smoothing) * (k == label) for k in range(len(logits))]
    total = math.log(sum(math.exp(z) for z in logits))
    return -sum(t * (z - total) for t, z in zip(target, logits, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_labels_weigh_the_cross_entropies_of_both_identities(smoothing):
    torch.manual_seed(0)
    logits, pids = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 0, 3, 4])
    mixed = MixedLabels(partner_pids=torch.tensor([3, 4, 0, 0]), anchor_share=torch.tensor([1.0, 0.0, 0.25, 0.7]))
    expected = [
        own * entropy_by_hand(z, y, smoothing) + (1 - own) * entropy_by_hand(z, other, smoothing)
        for z, y, other, own in zip(logits.tolist(), pids.tolist(), *(part.tolist() for part in mixed), strict=True)
    ]
    found = cross_entropy(logits, pids, mixed, label_smoothing=smoothing)
    assert found.item() == pytest.approx(sum(expected) / 4, rel=1e-6)
    whole = MixedLabels(mixed.partner_pids, torch.ones(4))
    alone = cross_entropy(logits, pids, None, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, pids, whole, label_smoothing=smoothing), alone)


def test_only_the_cross_entropy_of_the_stage_that_mixes_is_mixed():
    torch.manual_seed(0)
    features, logits, pids = torch.randn(3, 4), torch.randn(3, 5), torch.tensor([0, 0, 1])
    mixed = MixedLabels(partner_pids=torch.tensor([1, 1, 0]), anchor_share=torch.tensor([0.5, 0.25, 0.0]))
    plain = reid_losses(TrainOutput((features,) * 2, (logits,) * 2), pids, label_smoothing=0.1)
    found = reid_losses(TrainOutput((features,) * 2, (logits,) * 2, (None, mixed)), pids, label_smoothing=0.1)
    assert {name for name in plain if not torch.equal(plain[name], found[name])} == {"cross_entropy2"}
    with pytest.raises(ValueError, match="zip"):
        reid_losses(TrainOutput((features,) * 2, (logits,) * 2, (mixed,)), pids, label_smoothing=0.1)


def test_gradcheck_of_mixed_labels():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mixed = MixedLabels(
        partner_pids=torch.tensor([1, 1, 0]), anchor_share=torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64)
    )
    assert gradcheck(lambda z: cross_entropy(z, torch.tensor([0, 0, 3]), mixed, label_smoothing=0.1), logits)


def test_half_precision_logits_are_widened():
    logits = torch.tensor([[30000.0, -30000.0]], dtype=torch.float16)
    assert cross_entropy(logits, torch.tensor([1]), None, label_smoothing=0.0).item() == 60000
