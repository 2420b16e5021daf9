"""The mixes of the compared methods beside plain references: what is drawn, what is changed, and how labels follow."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pmm.models import cutmix, drop_block
from pmm.models import pmm as pmm_module
from pmm.models.cutmix import mixed_labels, random_box
from pmm.models.drop_block import drop_mask
from pmm.models.registry import build_model
from pmm.ops import hard_mix_select
from pmm.presets import preset

CPU = torch.device("cpu")
PIDS = torch.tensor([0, 0, 1, 1, 3, 3])


def model_of(method, **model):
    base = preset("tiny")
    torch.manual_seed(0)
    model = dataclasses.replace(base.model, method=method, num_classes=4, **model)
    return build_model(dataclasses.replace(base, model=model)).double()


def maps(n=6, h=8, w=4):
    torch.manual_seed(1)
    f1, x = torch.randn(2, n, 128, h, w, dtype=torch.float64)
    return f1, x, f1.mean((2, 3))


def largest(a):
    return F.adaptive_max_pool2d(a, 1).flatten(1)


def seen_by(model, monkeypatch):
    """The pooled vector that each stage gets, filled when the model runs."""
    seen = {}
    for stage, head in enumerate(model.stages):
        forward = head.forward
        monkeypatch.setattr(
            head, "forward", lambda p, stage=stage, forward=forward: seen.update({stage: p}) or forward(p)
        )
    return seen


def drawing(monkeypatch, module, name):
    """What `module.name` returned, in order."""
    drawn, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: drawn.append(original(*args)) or drawn[-1])
    return drawn


def test_the_baseline_is_stage_one_alone():
    model = model_of("baseline")
    images = torch.randn(6, 3, 128, 64, dtype=torch.float64)
    output = model(images, PIDS)
    head = model.stages[0]
    hidden = model.backbone(images).mean((2, 3)) @ head.reduction.weight.T + head.reduction.bias
    feature = ((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + head.bn.eps).sqrt()) * head.bn.weight
    feature = (feature + head.bn.bias).relu()
    torch.testing.assert_close(output.features, (feature,))
    torch.testing.assert_close(output.logits, (feature @ head.classifier.weight.T + head.classifier.bias,))
    assert (len(model.stages), model.embedding_dim, hasattr(model, "bottleneck")) == (1, 128, False)


def test_the_baseline_of_the_paper_has_512_dimensions_and_pmms_first_head():
    base = preset("paper")
    with torch.device("meta"):
        models = [
            build_model(dataclasses.replace(base, model=dataclasses.replace(base.model, method=name, num_classes=751)))
            for name in ("baseline", "pmm")
        ]
    assert models[0].embedding_dim == 512
    mine, others = (dict(model.state_dict()) for model in models)
    assert mine.keys() == {key for key in others if key.startswith(("backbone.", "stages.0."))}
    assert all(mine[key].shape == others[key].shape for key in mine)


@pytest.mark.parametrize("method", ["cutout-batch", "cutout-sample"])
def test_cutout_zeroes_a_rectangle_in_each_of_two_stages(method, monkeypatch):
    model, (f1, x, average) = model_of(method), maps()
    seen, drawn = seen_by(model, monkeypatch), drawing(monkeypatch, drop_block, "drop_mask")
    model.train_stages(f1, x, average, PIDS, torch.Generator().manual_seed(0))
    assert torch.equal(seen[0], average)
    assert len(drawn) == 2
    assert not torch.equal(*drawn)
    for stage, mask in enumerate(drawn, start=1):
        assert mask.shape == ((6 if method == "cutout-sample" else 1), 8, 4)
        expected = torch.stack([
            torch.tensor([
                max(0.0 if mask[n % len(mask), h, w] else x[n, c, h, w].item() for h in range(8) for w in range(4))
                for c in range(128)
            ], dtype=torch.float64)
            for n in range(6)
        ])  # fmt: skip
        assert torch.equal(seen[stage], expected)
    if method == "cutout-sample":
        assert any(not torch.equal(a, b) for mask in drawn for a, b in itertools.pairwise(mask))


def test_cutout_lets_no_nan_through_from_what_it_zeroes(monkeypatch):
    model, (f1, x, average) = model_of("cutout-sample"), maps()
    masks = drop_mask(8, 4, CPU, None, 6)
    monkeypatch.setattr(drop_block, "drop_mask", lambda *args: masks)
    x = x.masked_fill(masks[:, None], torch.nan).requires_grad_()
    output = model.train_stages(f1, x, average, PIDS, None)
    assert all(z.isfinite().all() for z in output.logits)
    sum(f.sum() for f in output.features[1:]).backward()
    assert x.grad.isfinite().all()
    assert x.grad.masked_select(masks[:, None]).count_nonzero() == 0


@given(st.integers(1, 24), st.integers(1, 9), st.integers(0, 10_000))
def test_a_box_is_one_rectangle_as_large_as_was_drawn_but_for_the_clipping(height, width, seed):
    box = random_box(height, width, CPU, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    side = torch.rand((), generator=generator).item() ** 0.5
    expected = torch.ones((height, width), dtype=torch.bool)
    for axis, size in enumerate((height, width)):
        length, centre = round(size * side), torch.randint(size, (), generator=generator).item()
        inside = torch.tensor([centre - length // 2 <= place < centre - length // 2 + length for place in range(size)])
        expected &= inside[:, None] if axis == 0 else inside
    assert torch.equal(box, expected)


def test_areas_and_centres_are_spread_as_they_should_be():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.stack([random_box(24, 8, CPU, generator) for _ in range(3000)]).double()
    areas = boxes.mean((1, 2))
    assert areas.min() == 0
    assert areas.max() > 0.8
    # E[rows clipped to the map] for s = sqrt(U), a uniform centre: E[s] - E[s^2] / 4 per side, and squared for both
    side = torch.rand(200_000, generator=generator).sqrt()
    centres = torch.rand(2, 200_000, generator=generator)
    spans = (centres + side / 2).clamp(max=1) - (centres - side / 2).clamp(min=0)
    assert areas.mean().item() == pytest.approx(spans.prod(0).mean().item(), abs=0.02)
    cover = boxes.mean(0)
    torch.testing.assert_close(cover, cover.flip(0), rtol=0, atol=0.05)
    torch.testing.assert_close(cover, cover.flip(1), rtol=0, atol=0.07)
    assert cover[11:13, 3:5].min() > cover[[0, 0, -1, -1], [0, -1, 0, -1]].max() + 0.1


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 1000))
def test_labels_have_the_true_shares(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    taken = torch.rand(4, height, width, generator=generator) < 0.4
    pids, partner = torch.tensor([5, 6, 6, 7]), torch.tensor([3, 0, 3, 1])
    labels = mixed_labels(pids, partner, taken)
    assert labels.partner_pids.tolist() == [7, 5, 7, 6]
    cells = height * width
    own = [1 - sum(map(bool, sample.flatten())) / cells for sample in taken]
    assert labels.anchor_share.tolist() == pytest.approx(own, abs=1e-6)


def test_cutmix_pastes_the_partners_box_and_nothing_else_changes(monkeypatch):
    model, (f1, x, average) = model_of("cutmix"), maps()
    seen = seen_by(model, monkeypatch)
    boxes = drawing(monkeypatch, cutmix, "random_box")
    partners = drawing(monkeypatch, cutmix, "sample_partners")
    output = model.train_stages(f1, x, average, PIDS, torch.Generator().manual_seed(7))
    assert torch.equal(seen[0], average)
    assert output.mixed[0] is None
    assert (len(boxes), len(partners)) == (2, 2)
    for stage, (box, partner) in enumerate(zip(boxes, partners, strict=True), start=1):
        mixed = x.clone()
        for n, h, w in itertools.product(range(6), range(8), range(4)):
            if box[h, w]:
                mixed[n, :, h, w] = x[partner[n], :, h, w]
        assert torch.equal(seen[stage], largest(mixed))
        assert (PIDS[partner] != PIDS).all()
        assert torch.equal(output.mixed[stage].partner_pids, PIDS[partner])
        torch.testing.assert_close(output.mixed[stage].anchor_share, torch.full((6,), 1 - box.sum().item() / 32))
    assert 0 < boxes[0].sum() < 32
    assert not torch.equal(boxes[0], boxes[1])
    assert not torch.equal(partners[0], partners[1])


def test_cutmix_lets_no_nan_through_from_cells_that_are_not_taken(monkeypatch):
    model, (f1, x, average) = model_of("cutmix"), maps(n=2)
    box = torch.zeros(8, 4, dtype=torch.bool)
    box[2:5, 1:] = True
    monkeypatch.setattr(cutmix, "random_box", lambda *args: box)
    x[0, :, 2:5, 1:] = torch.nan  # overwritten in sample 0, and taken by sample 1
    seen = seen_by(model, monkeypatch)
    model.train_stages(f1, x, average, torch.tensor([0, 1]), None)
    assert seen[1][0].isfinite().all()
    assert seen[1][1].isnan().all()


def attentive(model, f1, x, average, monkeypatch):
    """Run a model of attentive blocks; per stage the CAM's own ranking, the partners, and the stage's pooled vector."""
    seen = seen_by(model, monkeypatch)
    partners = drawing(monkeypatch, pmm_module, "sample_partners")
    original, cams = type(model).mixed_max, []
    monkeypatch.setattr(model, "mixed_max", lambda x, cam, p: cams.append(cam) or original(model, x, cam, p))
    output = model.train_stages(f1, x, average, PIDS, torch.Generator().manual_seed(2))
    return seen, partners, cams, output


@pytest.mark.parametrize("direction", ["replace", "paste"])
@pytest.mark.parametrize("k", [0, 3, 32])
def test_a_cutmix_moves_attentive_blocks_one_way_or_the_other(direction, k, monkeypatch):
    """Blocks of one cell: the k cells with the largest CAM, written out."""
    model, (f1, x, average) = model_of("a-cutmix", direction=direction, k=k), maps()
    seen, partners, cams, output = attentive(model, f1, x, average, monkeypatch)
    for stage, (partner, cam) in enumerate(zip(partners, cams, strict=True), start=1):
        mixed, own = x.clone(), []
        for n in range(6):
            # column-major ids break ties
            order = sorted(range(32), key=lambda b: (-cam[n, b % 8, b // 8].item(), b))[:k]
            cells = [(b % 8, b // 8) for b in order]
            if direction == "paste" and k:
                mixed[n] = x[partner[n]]
            for h, w in cells:
                mixed[n, :, h, w] = x[partner[n] if direction == "replace" else n, :, h, w]
            own.append({"replace": 1 - k / 32, "paste": k / 32 if k else 1.0}[direction])
        assert torch.equal(seen[stage], largest(mixed))
        assert (PIDS[partner] != PIDS).all()
        assert torch.equal(output.mixed[stage].partner_pids, PIDS[partner])
        assert output.mixed[stage].anchor_share.tolist() == pytest.approx(own)
    assert output.mixed[0] is None


@pytest.mark.parametrize("direction", ["replace", "paste"])
def test_a_sample_without_attention_is_not_mixed(direction, monkeypatch):
    model, (f1, x, average) = model_of("a-cutmix", direction=direction, on_empty="skip"), maps()
    monkeypatch.setattr(pmm_module, "cam", lambda maps, weights: torch.zeros(6, 8, 4, dtype=torch.float64))
    seen, _, _, output = attentive(model, f1, x, average, monkeypatch)
    assert torch.equal(seen[1], largest(x))
    assert output.mixed[1].anchor_share.tolist() == [1] * 6


def test_a_cutmix_replaces_as_pmm_does_and_only_its_labels_differ():
    images = torch.randn(6, 3, 128, 64, dtype=torch.float64)
    outputs = [model_of(m)(images, PIDS, torch.Generator().manual_seed(4)) for m in ("a-cutmix", "pmm")]
    assert all(map(torch.equal, outputs[0].features + outputs[0].logits, outputs[1].features + outputs[1].logits))
    assert [labels is None for labels in outputs[0].mixed] == [True, False, False]
    assert all(labels is None for labels in outputs[1].mixed)


def test_a_cutmix_pasted_lets_no_nan_through_from_what_is_covered():
    model, (_, x, _) = model_of("a-cutmix", direction="paste", k=2), maps(n=2)
    cam = torch.zeros(2, 8, 4, dtype=torch.float64)
    cam[:, 0, 0], cam[:, 5, 2] = 2, 1
    x[0, :, 0, 0] = torch.nan  # kept by sample 0, covered by sample 1's own cell where it is pasted over sample 0
    pooled, taken = model.mixed_max(x, cam, torch.tensor([1, 0]))
    assert pooled[0].isnan().all()
    assert pooled[1].isfinite().all()
    assert taken.sum((1, 2)).tolist() == [30, 30]
    assert cutmix.mixed_labels(torch.tensor([0, 1]), torch.tensor([1, 0]), taken).anchor_share.tolist() == [2 / 32] * 2


def test_pmm_with_k_0_is_three_heads_without_mixing(monkeypatch):
    model, (f1, x, average) = model_of("pmm", k=0), maps()
    seen = seen_by(model, monkeypatch)
    model.train_stages(f1, x, average, PIDS, None)
    assert torch.equal(seen[0], average)
    assert torch.equal(seen[1], largest(x))
    assert torch.equal(seen[2], largest(x))


def test_hard_mix_select_is_a_select():
    x, partner = torch.randn(4, 3, 5, 2, requires_grad=True), torch.tensor([2, 3, 0, 1])
    replaced = torch.rand(4, 5, 2) < 0.5
    mixed = hard_mix_select(x, replaced, partner)
    expected = torch.where(replaced[:, None], x[partner], x)
    assert torch.equal(mixed, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (mixed, expected)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(NotImplementedError, match="hard_mix_select: no forward-mode derivative"):
        torch.func.jvp(lambda x: hard_mix_select(x, replaced, partner), (x.detach(),), (x.detach(),))
