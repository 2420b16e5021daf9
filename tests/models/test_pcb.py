"""PCB and its refined parts, property by property; sums of many terms in float64."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from pmm.models.pcb import StripeMeans, per_part
from pmm.models.registry import build_model, check_network, deployed
from pmm.models.rpp import LEAST_PART, STRIPES, PartClassifier, SoftParts, pooled_by
from pmm.presets import preset
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


# Refined part pooling


def shares_of(model, maps):
    return model.part_classifier(maps)


@pytest.fixture
def refined():
    model = model_of("pcb-rpp").eval()
    nn.init.normal_(model.part_classifier.conv.weight)
    nn.init.normal_(model.part_classifier.conv.bias)
    return model


@torch.no_grad()
def test_the_shares_of_a_cell_add_up_to_1_and_the_parts_to_the_mean(refined):
    maps = maps_of()
    shares = shares_of(refined, maps)
    assert (shares.sum(1) - 1).abs().max() < 1e-14
    parts = refined.pooling()(maps)
    torch.testing.assert_close(parts.sum(2), 4 * maps.mean((2, 3)), rtol=0, atol=1e-13)


@torch.no_grad()
def test_without_weights_every_part_is_the_mean(refined):
    for parameter in refined.part_classifier.parameters():
        parameter.zero_()
    maps = maps_of()
    assert torch.equal(shares_of(refined, maps), torch.full((6, 4, 8, 4), 0.25, dtype=torch.float64))
    torch.testing.assert_close(refined.pooling()(maps), maps.mean((2, 3))[..., None].expand(-1, -1, 4))


@torch.no_grad()
def test_shares_that_are_stripes_give_the_stripes_means(refined):
    stripes = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 1)[None, :, :, None].expand(6, -1, -1, 4)
    maps = maps_of()
    torch.testing.assert_close(pooled_by(stripes, maps), refined.stripes(maps), rtol=0, atol=1e-14)


@torch.no_grad()
def test_shuffled_cells_are_pooled_alike_but_not_by_stripes(refined):
    maps = maps_of()
    order = torch.randperm(32)
    shuffled = maps.flatten(2)[:, :, order].reshape(MAP)
    torch.testing.assert_close(refined.pooling()(shuffled), refined.pooling()(maps), rtol=0, atol=1e-13)
    assert (refined.stripes(shuffled) - refined.stripes(maps)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("channels", "merged", "inputs"), [(2048, 8, 256), (512, 2, 256), (128, 1, 128)])
def test_the_part_classifier_sees_means_of_neighbouring_channels_without_their_mean(channels, merged, inputs):
    classifier, maps = PartClassifier(channels, 3).double(), maps_of((2, channels, 4, 2))
    assert (classifier.merged, classifier.conv.in_channels) == (merged, inputs)
    expected = torch.stack([maps[:, first : first + merged].mean(1) for first in range(0, channels, merged)], 1)
    expected = expected - expected.mean((2, 3), keepdim=True)
    torch.testing.assert_close(classifier(maps), classifier.conv(expected).softmax(1))
    torch.testing.assert_close(classifier(maps + 7), classifier(maps))


def test_a_checkpoint_of_pcb_lacks_the_part_classifier_alone():
    refined = build_model(config_of("pcb-rpp"))
    found = refined.load_state_dict(build_model(config_of("pcb")).state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert set(found.missing_keys) == {"part_classifier.conv.weight", "part_classifier.conv.bias"}


def test_in_the_first_phase_it_is_pcb():
    refined, plain = model_of("pcb-rpp"), model_of("pcb")
    refined.load_state_dict(plain.state_dict(), strict=False)
    maps = maps_of()
    refined.start_phase(STRIPES)
    for model in (refined, plain):
        model.eval()
    with torch.no_grad():
        assert torch.equal(refined(maps), plain(maps))
        assert torch.equal(deployed_on(refined, maps), plain(maps))
        refined.start_phase("parts")
        assert not torch.allclose(refined(maps), plain(maps), atol=1e-4)


def deployed_on(model, maps):
    model.backbone.merge_branches = lambda: None
    network = deployed(model)
    return network.l2_normalize(network.tail(maps))


def test_the_least_part_is_recorded_and_no_loss():
    model = model_of("pcb-rpp")
    output = model(maps_of(), PIDS)
    assert output.figures.keys() == {LEAST_PART}
    assert 0 < output.figures[LEAST_PART] <= 0.25
    assert not output.figures[LEAST_PART].requires_grad
    assert not output.penalties


def test_soft_parts_have_the_gradient_of_their_cells():
    classifier = PartClassifier(6, 2).double()
    assert torch.autograd.gradcheck(SoftParts(classifier), maps_of((1, 6, 2, 2)).requires_grad_())
