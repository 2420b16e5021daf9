"""PCB, property by property; sums of many terms in float64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pmm.models.pcb import StripeMeans, per_part
from pmm.models.registry import build_model, check_network
from pmm.presets import preset
from pmm.training.losses import reid_losses
from pmm.utils.errors import ConflictingOptions, InvalidValue
from tests.refusals import refuses

PIDS = torch.tensor([0, 0, 1, 1, 3, 3])
MAP = torch.Size((6, 128, 8, 4))


class Given(nn.Module):
    """In place of a backbone: the map itself."""

    def forward(self, images):
        return images


def config_of(method="pcb", name="tiny", **model):
    base = preset(name, method)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **{"num_classes": 4, **model}))


def model_of(method="pcb", **model):
    """In float64, on maps."""
    torch.manual_seed(0)
    built = build_model(config_of(method, **model))
    built.backbone = Given()
    return built.double()


def maps_of(shape=MAP):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "model", "count"),
    [
        ("pcb", {}, 25_190_874),
        ("pcb", {"reduction": "independent"}, 27_814_874),
        ("pcb-rpp", {}, 25_192_416),
    ],
)
def test_at_751_identities_it_has_the_parameters_of_the_papers_network(method, model, count):
    with torch.device("meta"):
        built = build_model(config_of(method, "paper", num_classes=751, **model))
    assert sum(parameter.numel() for parameter in built.parameters()) == count


@pytest.mark.parametrize(
    ("embedding", "name", "dim"), [("g", "paper", 12_288), ("h", "paper", 1_536), ("h", "tiny", 256)]
)
def test_the_embedding_has_the_dimensions_of_the_parts(embedding, name, dim):
    with torch.device("meta"):
        assert build_model(config_of(name=name, embedding=embedding)).embedding_dim == dim


def test_a_map_that_is_constant_in_each_stripe_is_pooled_to_these_constants():
    values = maps_of((2, 5, 4))
    maps = values.repeat_interleave(2, dim=2)[..., None].expand(-1, -1, -1, 3)
    torch.testing.assert_close(StripeMeans(4)(maps), values)


@pytest.mark.parametrize("reduction", ["shared", "independent"])
def test_a_stripe_changes_only_its_own_part(reduction):
    model, maps = model_of(reduction=reduction).eval(), maps_of()
    changed = maps.clone()
    changed[:, :, 2:4] += 1
    for maker in (lambda x: model.stripes(x).unbind(2), lambda x: model(x, PIDS).logits):
        with torch.no_grad():
            torch.manual_seed(1)
            before = maker(maps)
            torch.manual_seed(1)
            after = maker(changed)
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False, False]


@pytest.mark.parametrize("method", ["pcb", "pcb-rpp"])
@pytest.mark.parametrize("embedding", ["g", "h"])
@pytest.mark.parametrize("reduction", ["shared", "independent"])
def test_the_embedding_has_length_1_and_each_part_its_share(method, embedding, reduction):
    model = model_of(method, embedding=embedding, reduction=reduction).eval()
    with torch.no_grad():
        embeddings = model(maps_of())
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(embeddings.reshape(6, 4, -1).norm(dim=2), torch.tensor(1 / math.sqrt(4), dtype=torch.float64))


def test_by_a_shared_reduction_exchanged_stripes_are_exchanged_features():
    model, pooled, order = model_of().eval(), maps_of((6, 128, 4)), [2, 0, 3, 1]
    with torch.no_grad():
        found = per_part(pooled[:, :, order], model.reductions)
        torch.testing.assert_close(found, per_part(pooled, model.reductions)[:, :, order])


def test_an_independent_reduction_sees_its_own_part_alone():
    model, pooled = model_of(reduction="independent").eval(), maps_of((6, 128, 4))
    assert len(model.reductions) == 4
    with torch.no_grad():
        found = per_part(pooled, model.reductions)
        for part, reduction in enumerate(model.reductions):
            torch.testing.assert_close(found[:, :, part : part + 1], reduction(pooled[:, :, part : part + 1]))


def test_a_shared_batch_norm_has_the_statistics_of_all_parts():
    model, maps = model_of(dropout=0.0), maps_of()
    reduction = model.reductions[0]
    model(maps, PIDS)
    with torch.no_grad():
        vectors = reduction.conv(model.stripes(maps)).transpose(1, 2).flatten(0, 1)
    assert vectors.shape == (24, 64)
    torch.testing.assert_close(reduction.bn.running_mean, 0.1 * vectors.mean(0))


@pytest.mark.parametrize("reduction", ["shared", "independent"])
def test_embedding_h_is_of_the_reduction_before_its_batch_norm(reduction):
    model, maps = model_of(embedding="h", reduction=reduction).eval(), maps_of()
    for each in model.reductions:
        nn.init.uniform_(each.bn.running_mean)
    with torch.no_grad():
        parts = per_part(model.stripes(maps), [each.conv for each in model.reductions])
        expected = torch.cat([F.normalize(part, dim=1) for part in parts.unbind(2)], 1) / 2
        torch.testing.assert_close(model(maps), expected)
    convolutions = [type(module) for module in model.tail().modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]
    assert not convolutions  # which OpenCV 5.0 computes wrongly in 8 bits


def test_the_loss_is_the_sum_of_the_parts_cross_entropies():
    """Of the mean, the rates of the recipe would have to be as many times larger."""
    model = model_of(dropout=0.0)
    output = model(maps_of(), PIDS)
    losses = reid_losses(output, PIDS, label_smoothing=preset("paper", "pcb").recipe.label_smoothing)
    expected = [F.cross_entropy(logits, PIDS) for logits in output.logits]
    assert len(expected) == 4
    torch.testing.assert_close(torch.stack(list(losses.values())), torch.stack(expected))


def test_the_loss_of_a_part_has_no_gradient_in_another():
    """In eval mode; in training the statistics of the shared batch-norm couple them."""
    model = model_of().eval()
    pooled = maps_of((6, 128, 4)).requires_grad_()
    features = per_part(pooled, model.reductions)
    for part, classifier in enumerate(model.classifiers):
        (gradient,) = torch.autograd.grad(classifier(features[:, :, part]).sum(), pooled, retain_graph=True)
        touched = gradient.abs().amax((0, 1)) > 0
        assert touched.tolist() == [each == part for each in range(4)]


def test_dropout_is_before_the_reduction_and_in_training_alone():
    model, maps = model_of(dropout=0.5), maps_of()
    seen = []
    model.reductions[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(maps, PIDS, torch.Generator().manual_seed(3))
    dropped, pooled = seen[0] == 0, model.stripes(maps)
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(seen[0][~dropped], 2 * pooled[~dropped])
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(maps), model(maps))


@pytest.mark.parametrize(("parts", "fitting"), [(3, "1, 2, 4 or 8"), (16, "1, 2, 4 or 8")])
def test_parts_that_do_not_divide_the_map_are_refused_with_those_that_do(parts, fitting):
    for method in ("pcb", "pcb-rpp"):
        with refuses(InvalidValue, fitting, "8 rows", "128x64", name="--parts", value=parts):
            check_network(config_of(method, parts=parts))


def test_the_last_stride_halves_the_map_and_is_for_resnets():
    with refuses(InvalidValue, "1, 2 or 4", "4 rows", name="--parts", value=8):
        check_network(config_of(last_stride=2, parts=8))
    assert build_model(config_of(last_stride=2)).backbone(torch.zeros(1, 3, 128, 64)).shape == (1, 128, 4, 2)
    with refuses(ConflictingOptions, "timm:resnet18", options=("last_stride", "backbone")):
        config_of(backbone="timm:resnet18", last_stride=2)
