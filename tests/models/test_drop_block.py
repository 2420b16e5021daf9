import dataclasses

import pytest
import torch
import torch.nn.functional as F

from pmm.models.drop_block import drop_mask
from pmm.models.registry import build_model, deployed
from pmm.presets import preset

CPU = torch.device("cpu")


def model_of(name="tiny", **model):
    base = preset(name)
    return build_model(dataclasses.replace(base, model=dataclasses.replace(base.model, method="bdb", **model)))


def test_paper_has_the_published_shape():
    model = model_of("paper", num_classes=751)
    assert [(head.reduction.in_features, head.bn.num_features) for head in model.stages] == [(2048, 512), (2048, 1024)]
    assert [tuple(head.classifier.weight.shape) for head in model.stages] == [(751, 512), (751, 1024)]
    assert model.embedding_dim == 1536
    for head, fan in zip(model.stages, (2048, 1024), strict=True):  # 1x1 conv: fan in; linear: fan out
        assert head.reduction.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)


def test_blocks_of_the_mix_do_not_concern_it():
    assert model_of(num_classes=3, k=10_000, block=(50, 50)).embedding_dim == 384


@pytest.mark.parametrize(("height", "width", "rows"), [(24, 8, 8), (8, 4, 3), (7, 3, 2), (3, 1, 1), (1, 1, 0)])
def test_the_rectangle_is_a_third_of_the_rows_at_every_position(height, width, rows):
    torch.manual_seed(0)
    starts = set()
    for _ in range(300):
        mask = drop_mask(height, width, CPU)
        assert mask.shape == (height, width)
        assert mask.all(1).equal(mask.any(1))  # full width
        found = mask.any(1).nonzero().flatten()
        assert len(found) == rows
        if rows:
            assert found.tolist() == list(range(found[0], found[0] + rows))
            starts.add(found[0].item())
    assert starts == (set(range(height - rows + 1)) if rows else set())


def test_positions_are_uniform():
    generator = torch.Generator().manual_seed(0)
    starts = torch.stack([drop_mask(24, 8, CPU, generator)[:, 0].int().argmax() for _ in range(3400)])
    counts = torch.bincount(starts, minlength=17)
    assert counts.shape == (17,)
    chi2 = ((counts - 200.0) ** 2 / 200).sum()
    assert chi2 < 39.3  # 16 degrees of freedom, p = 0.001


@pytest.mark.parametrize("count", [1, 5])
def test_many_rectangles_are_drawn_each_by_itself(count):
    generator = torch.Generator().manual_seed(0)
    drawn = [drop_mask(24, 8, CPU, generator, count) for _ in range(40)]
    assert drawn[0].shape == (count, 24, 8)
    assert all(mask.sum((1, 2)).eq(64).all() for mask in drawn)
    starts = torch.cat([mask[:, :, 0].int().argmax(1, keepdim=True).T for mask in drawn])
    assert all(len(starts[:, place].unique()) > 8 for place in range(count))
    if count > 1:
        assert len(starts[0].unique()) > 1


def test_a_narrower_rectangle_moves_sideways_too(monkeypatch):
    monkeypatch.setattr("pmm.models.drop_block.WIDTH_RATIO", 0.5)
    corners = set()
    for _ in range(400):
        rows, columns = drop_mask(6, 4, CPU).nonzero(as_tuple=True)
        assert (len(rows.unique()), len(columns.unique()), len(rows)) == (2, 2, 4)
        corners.add((rows.min().item(), columns.min().item()))
    assert corners == {(r, c) for r in range(5) for c in range(3)}


def test_training_zeroes_one_rectangle_for_the_whole_batch(monkeypatch):
    """Written out: branch 1 pools F1, branch 2 the rest of X, negative values included."""
    masks = []
    monkeypatch.setattr("pmm.models.drop_block.drop_mask", lambda *args: masks.append(drop_mask(*args)) or masks[-1])
    torch.manual_seed(0)
    model = model_of(num_classes=4).double()
    images, pids = torch.randn(6, 3, 128, 64, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 3, 3])
    output = model(images, pids)
    assert len(masks) == 1
    f1 = model.backbone(images)
    x = model.bottleneck(f1)
    kept = x * (~masks[0]).double()
    assert (kept != x).flatten(1).any(1).all()
    for stage, pooled in enumerate((f1.mean((2, 3)), F.adaptive_max_pool2d(kept, 1).flatten(1))):
        feature, logits = model.stages[stage](pooled)
        torch.testing.assert_close(output.features[stage], feature)
        torch.testing.assert_close(output.logits[stage], logits)
    assert [f.shape[1] for f in output.features] == [128, 256]


def test_what_is_dropped_counts_as_zero_and_carries_no_gradient_or_nan(monkeypatch):
    model = model_of(num_classes=4)
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[2:5] = True
    monkeypatch.setattr("pmm.models.drop_block.drop_mask", lambda *args: mask)
    seen = []
    monkeypatch.setattr(model.stages[1], "forward", lambda pooled: seen.append(pooled) or (pooled, pooled))
    f1 = torch.randn(5, 128, 8, 4)
    x = -torch.rand(5, 128, 8, 4) - 1
    x[:, ::2, 2:5] = torch.nan
    x.requires_grad_()
    output = model.train_stages(f1, x, f1.mean((2, 3)), torch.zeros(5, dtype=torch.int64), None)
    assert torch.equal(seen[0], torch.zeros(5, 128))
    output.features[1].sum().backward()
    assert x.grad.count_nonzero() == 0


def test_the_same_generator_gives_the_same_rectangle():
    model = model_of(num_classes=4)
    images, pids = torch.randn(8, 3, 128, 64), torch.arange(8) // 2
    outputs = [model(images, pids, torch.Generator().manual_seed(seed)) for seed in (3, 3, 5, 6, 7)]
    assert torch.equal(outputs[0].features[1], outputs[1].features[1])
    assert any(not torch.equal(outputs[0].features[1], other.features[1]) for other in outputs[2:])
    assert torch.equal(outputs[0].features[0], outputs[4].features[0])
    torch.manual_seed(11)  # and the global one
    first = model(images, pids).features[1]
    torch.manual_seed(11)
    assert torch.equal(first, model(images, pids).features[1])


def test_the_test_embedding_drops_nothing():
    model = model_of(num_classes=4).eval()
    images = torch.randn(3, 3, 128, 64)
    with torch.inference_mode():
        f1 = model.backbone(images)
        x = model.bottleneck(f1)
        expected = [model.stages[0].feature(f1.mean((2, 3))), model.stages[1].feature(x.flatten(2).max(2).values)]
        assert torch.equal(model(images), model(images))
        torch.testing.assert_close(model(images), torch.cat(expected, 1))


def test_deployed_has_one_layer_per_branch():
    linear = [m for m in deployed(model_of(num_classes=4)).modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(128, 128), (128, 256)]
