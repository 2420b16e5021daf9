import dataclasses

import pytest
import torch
import torch.nn.functional as F

from pmm.models.registry import METHODS, build_model, deployed
from pmm.presets import preset
from pmm.utils.errors import InvalidValue
from tests.refusals import refuses


def config_of(name, method="pmm", **model):
    base = preset(name)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, method=method, **model))


def test_paper_has_the_published_size():
    model = build_model(config_of("paper", num_classes=751))
    assert sum(p.numel() for p in model.parameters()) == 32_276_749
    assert model.embedding_dim == 1536


def test_paper_maps_are_24_by_8():
    config = config_of("paper", num_classes=3)
    model = build_model(config).eval()
    with torch.inference_mode():
        f1 = model.backbone(torch.zeros(1, 3, 384, 128))
        assert f1.shape == (1, 2048, 24, 8)
        assert model.bottleneck(f1).shape == (1, 2048, 24, 8)


def test_initialisation_is_the_published_one():
    model = build_model(config_of("paper", num_classes=751))
    for head, fan in zip(model.stages, (2048, 512, 512), strict=True):  # 1x1 conv: fan in; linear: fan out
        assert head.reduction.bias.abs().max() == head.classifier.bias.abs().max() == head.bn.bias.abs().max() == 0
        assert head.reduction.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)
        assert head.classifier.weight.std().item() == pytest.approx((2 / 751) ** 0.5, rel=0.05)  # kaiming, fan out
        assert head.bn.weight.mean().item() == pytest.approx(1, abs=0.005)
        assert head.bn.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_deployed_pmm_has_one_layer_for_stages_two_and_three():
    network = deployed(build_model(config_of("tiny", num_classes=4)))
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(128, 128), (128, 256)]


def test_stages_mix_the_unmixed_map_guided_by_the_stage_before(monkeypatch):
    """X2 = HardMix(X, CAM(F1, z1)), X3 = HardMix(X, CAM(X2, z2)), written out with autograd and separate ops."""
    from pmm.models import pmm as module

    partners = [torch.tensor([2, 3, 0, 1]), torch.tensor([3, 2, 1, 0])]
    draws = iter(partners * 2)
    monkeypatch.setattr(module, "sample_partners", lambda pids, generator=None: next(draws))
    torch.manual_seed(1)
    model = build_model(config_of("tiny", num_classes=4, block=(2, 2), k=2)).double()
    images, pids = torch.randn(4, 3, 128, 64, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    output = model(images, pids)

    def guided(maps, pool, head):
        leaf = maps.detach().requires_grad_()
        score = head(pool(leaf))[1].gather(1, pids[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, leaf)
        return (gradient.mean((2, 3))[:, :, None, None] * leaf).sum(1).relu().detach()

    def largest(a):
        return F.adaptive_max_pool2d(a, 1).flatten(1)

    f1 = model.backbone(images)
    x = model.bottleneck(f1)
    x2, _ = torch.ops.pmm.hard_mix(
        x, guided(f1, lambda a: a.mean((2, 3)), model.stages[0]), partners[0], [2, 2], 2, "first"
    )
    x3, _ = torch.ops.pmm.hard_mix(x, guided(x2, largest, model.stages[1]), partners[1], [2, 2], 2, "first")
    for stage, pooled in enumerate((f1.mean((2, 3)), largest(x2), largest(x3))):
        feature, logits = model.stages[stage](pooled)
        torch.testing.assert_close(output.features[stage], feature)
        torch.testing.assert_close(output.logits[stage], logits)


def test_forward_touches_no_gradient_and_the_same_generator_gives_the_same_mix():
    model = build_model(config_of("tiny", num_classes=4))
    images, pids = torch.randn(8, 3, 128, 64), torch.arange(8) // 2
    outputs = [model(images, pids, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(outputs[0].features[2], outputs[1].features[2])
    assert not torch.equal(outputs[0].features[2], outputs[2].features[2])
    assert torch.equal(outputs[0].features[0], outputs[2].features[0])


def test_unknown_method_and_blocks_that_do_not_fit():
    with refuses(InvalidValue, *METHODS, name="--method", value="pmn", hint="did you mean pmm?"):
        build_model(config_of("tiny", "pmn", num_classes=4))
    with refuses(InvalidValue, "32 at most", "1x1", "8x4", "128x64", name="--k", value=33):
        build_model(config_of("tiny", num_classes=4, k=33))
