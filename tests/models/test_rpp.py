"""Refined part pooling, property by property; sums of many terms in float64."""

import pytest
import torch
from torch import nn

from pmm.models.registry import build_model, deployed
from pmm.models.rpp import LEAST_PART, STRIPES, PartClassifier, SoftParts, pooled_by
from tests.models.test_pcb import MAP, PIDS, config_of, maps_of, model_of


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
    model = model_of("pcb-rpp", dropout=0.0)
    nn.init.zeros_(model.part_classifier.conv.weight)
    with torch.no_grad():
        model.part_classifier.conv.bias.copy_(torch.tensor([0.3, 0.1, 0.2, 0.4]).log())
    output = model(maps_of(), PIDS)
    assert output.figures.keys() == {LEAST_PART}
    assert output.figures[LEAST_PART] == pytest.approx(0.1)
    assert not output.figures[LEAST_PART].requires_grad
    assert not output.penalties


def test_in_training_the_part_classifier_sees_dropout_and_the_parts_do_not():
    model, maps = model_of("pcb-rpp", dropout=0.5), maps_of()
    nn.init.normal_(model.part_classifier.conv.weight)
    seen = []
    model.part_classifier.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    pooled, _ = model.train_pool(maps, torch.Generator().manual_seed(3))
    ((dropped, shares),) = seen
    zeros = dropped == 0
    assert 0.45 < zeros.double().mean() < 0.55
    torch.testing.assert_close(dropped[~zeros], 2 * maps[~zeros])
    assert torch.equal(pooled, pooled_by(shares, maps))


def test_soft_parts_have_the_gradient_of_their_cells():
    classifier = PartClassifier(6, 2).double()
    assert torch.autograd.gradcheck(SoftParts(classifier), maps_of((1, 6, 2, 2)).requires_grad_())
