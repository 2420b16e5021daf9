"""AOS's network and its two trainings; what is hidden of crops is tested beside `pmm.data.occlusion`."""

import dataclasses

import pytest
import torch
from torch import nn

from pmm.models.backbone import Backbone
from pmm.models.registry import build_model, deployed, phases_of
from pmm.presets import preset
from pmm.training.flags import parse
from pmm.training.state import learning_rate
from pmm.utils.errors import ConflictingOptions, InvalidValue
from tests.refusals import refuses

PIDS = torch.tensor([0, 0, 1, 1, 3, 3])


class Given(Backbone):
    """In place of a backbone: the map itself."""

    def forward(self, images):
        return images


def config_of(name="tiny", **model):
    base = preset(name, "aos")
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **{"num_classes": 4, **model}))


def model_of(**model):
    """In float64, on maps."""
    torch.manual_seed(0)
    built = build_model(config_of(**model))
    built.backbone = Given()
    return built.double()


def test_the_parameters_of_the_paper():
    with torch.device("meta"):
        model = build_model(config_of("paper", num_classes=751))
        shape = model.backbone(torch.empty(1, 3, 256, 128)).shape
    assert sum(weight.numel() for weight in model.parameters()) == 25_046_831
    assert shape == (1, 2048, 8, 4)


def test_the_classifier_begins_near_zero():
    classifier = build_model(config_of(num_classes=500)).classifier
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not classifier.bias.any()


def test_a_neck_takes_from_the_embedding_what_all_crops_share():
    """It has no shift of its own, in training and in the deployed network alike; the paper's network has none."""
    model, maps = model_of(neck="bn"), 5 + torch.rand(64, 128, 8, 4, dtype=torch.float64)
    for _ in range(200):
        model(maps, PIDS.repeat(11)[:64])
    deployed_model = deployed(model.eval())
    average = maps.flatten(2).mean(2)
    centred = (average - average.mean(0)) / average.std(0)
    expected = centred / centred.norm(dim=1, keepdim=True)
    torch.testing.assert_close(deployed_model(maps), expected, rtol=1e-3, atol=1e-4)
    assert not [module for module in build_model(config_of("paper")).modules() if isinstance(module, nn.BatchNorm1d)]
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["average.1.bias"]


def test_the_embedding_is_the_average_of_length_one():
    model, maps = model_of(neck="none").eval(), torch.rand(6, 128, 8, 4, dtype=torch.float64)
    average = maps.flatten(2).mean(2)
    expected = average / average.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(maps), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(deployed(model)(maps), expected, rtol=1e-12, atol=0)


def test_dropout_is_before_the_classifier_and_in_training_alone():
    model, maps = model_of(neck="none", dropout=0.75), torch.rand(4000, 128, 1, 1, dtype=torch.float64)
    model.classifier = nn.Identity()
    (dropped,) = model(maps, PIDS, torch.Generator().manual_seed(1)).logits
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.25, abs=0.003)  # of half a million: five deviations
    torch.testing.assert_close(dropped[kept], 4 * maps.flatten(1)[kept])
    assert (model.eval()(maps) != 0).all()
    (whole,) = model_of(neck="none", dropout=0.0)(maps, PIDS).logits
    assert torch.equal(whole, model_of(neck="none").classifier(maps.flatten(1)))


def test_both_trainings_have_the_paper_s_rates_and_the_same_random_numbers():
    first, second = phases_of(preset("paper", "aos"))
    for phase in (first, second):
        heads = [learning_rate(phase.recipe, epoch, 1) for epoch in range(60)]
        assert heads == pytest.approx([0.02] * 25 + [0.002] * 25 + [0.0002] * 10)
        assert phase.recipe.backbone_lr == 0.5
        assert phase.recipe.optimizer == "sgd"
    assert (first.anew, first.occludes) == (False, False)
    assert (second.anew, second.occludes) == (True, True)
    assert [second.stream(epoch) for epoch in second.epochs] == list(first.epochs)


@pytest.mark.parametrize(("name", "value"), [("cutout", 0.5), ("shift", 4)])
@pytest.mark.parametrize("preset_name", ["paper", "tiny", "strong"])
def test_crops_may_not_move_below_the_windows(name, value, preset_name):
    flags = ["--method", "aos", "--preset", preset_name]
    assert getattr(parse(flags).config.recipe, name) == 0
    with refuses(ConflictingOptions, value, f"--{name}", "aos", options=(f"--{name}", "--method"), hint="leave it out"):
        parse([*flags, f"--{name}", str(value)])


def test_there_must_be_windows_to_choose_from():
    assert parse(["--method", "aos", "--preset", "tiny", "--aos-step", "99"])
    with refuses(InvalidValue, "99 at most", "128x64", "28x28", name="--aos-step", value=100):
        parse(["--method", "aos", "--preset", "tiny", "--aos-step", "100"])
    with refuses(InvalidValue, "640x64", "64x64", name="--width", value=64):
        parse(["--method", "aos", "--preset", "tiny", "--height", "640"])
    with refuses(InvalidValue, "at least 2", name="--epochs", value=1):
        parse(["--method", "aos", "--preset", "tiny", "--epochs", "1"])
