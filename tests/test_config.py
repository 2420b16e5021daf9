import json
import re

import pytest

from pmm.config import Config, ModelConfig
from pmm.data.dataset_specs import DATASETS
from pmm.models.registry import METHODS
from pmm.presets import PRESETS, preset
from pmm.recipe import RecipeConfig
from pmm.utils.errors import ConflictingOptions, InvalidInput, InvalidValue
from tests.conftest import ROOT
from tests.refusals import refuses


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name)
    assert config.preset == name
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_preset_is_the_published_recipe():
    config = preset("paper")
    assert (config.data.height, config.data.width) == (384, 128)
    assert (config.recipe.epochs, config.recipe.batch_size, config.recipe.images_per_id) == (400, 128, 4)
    assert config.recipe.ids_per_batch == 32
    assert (config.model.block, config.model.k, config.model.on_empty) == ((3, 2), 3, "first")
    assert (config.recipe.weight_decay, config.recipe.label_smoothing) == (5e-4, 0.1)
    assert (config.recipe.cutout, config.recipe.cutout_size, config.recipe.flip) == (0.5, (64, 64), 0.5)


def test_the_help_names_every_data_set_and_method():
    said = (ROOT / "pmm" / "config.py").read_text()  # the docstrings of its fields are the help
    for name in (*DATASETS, *METHODS):
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", said), name


def test_unknown_keys_are_refused_and_the_known_ones_named():
    values = preset("tiny").to_dict()
    values["recipe"]["epoks"] = 3
    with refuses(InvalidInput, "config.recipe.epoks", "epochs, "):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("section", "key", "value", "text"),
    [
        ("recipe", "epochs", "many", "config.recipe.epochs is 'many'; expected int"),
        ("recipe", "epochs", True, "epochs is True; expected int"),
        ("model", "block", [1, 2, 3], "config.model.block is [1, 2, 3]; expected 2 values"),
        ("data", "mean", ["a", 0, 0], "config.data.mean is 'a'; expected a finite float"),
        ("recipe", "schedule", "foo", "'foo'; expected one of paper, flat-cosine"),
    ],
)
def test_values_of_another_type_are_refused(section, key, value, text):
    values = preset("tiny").to_dict()
    values[section][key] = value
    with refuses(InvalidInput, text):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("section", "key", "value", "facts"),
    [
        ("recipe", "epochs", 0, ("config.recipe.epochs is 0", "at least 1")),
        ("recipe", "batch_size", 30, ("config.recipe.batch_size is 30", "--images-per-id 4")),
        ("recipe", "warmup", -0.1, ("config.recipe.warmup is -0.1", "0 to 1")),
        ("recipe", "flat", 1.5, ("config.recipe.flat is 1.5", "0 to 1")),
        ("recipe", "cutout_size", [0, 3], ("config.recipe.cutout_size is (0, 3)", "positive")),
        ("model", "block", [0, 2], ("config.model.block is (0, 2)", "positive")),
        (
            "model",
            "backbone",
            "vgg",
            ("config.model.backbone", "'vgg'", "resnet50-ibn-a, resnet10 or timm:NAME"),
        ),
        ("model", "num_classes", -4, ("config.model.num_classes is -4",)),
        ("data", "std", [0, 1, 1], ("config.data.std", "positive")),
        ("data", "height", 5000, ("config.data.height is 5000", "4096")),
        ("data", "val_identities", 1.0, ("config.data.val_identities is 1.0", "below 1")),
    ],
)
def test_values_out_of_range_are_refused(section, key, value, facts):
    values = preset("tiny").to_dict()
    values[section][key] = value
    with refuses(InvalidValue, *facts):
        Config.from_dict(values)


def test_a_rise_beyond_the_fall_is_a_conflict():
    with refuses(ConflictingOptions, "0.6", "0.2", options=("warmup", "flat")):
        RecipeConfig(warmup=0.6, flat=0.2)


def test_a_section_must_be_a_table():
    with refuses(InvalidInput, "config.model is 3"):
        Config.from_dict({"model": 3})
    with refuses(InvalidInput, "config is 3"):
        Config.from_dict(3)


def test_unknown_preset_lists_the_known():
    with refuses(InvalidValue, "preset is 'huge'", choices=tuple(PRESETS)):
        preset("huge")


def test_differences_name_each_key():
    a = Config(recipe=RecipeConfig(epochs=3), model=ModelConfig(k=1))
    b = Config(recipe=RecipeConfig(epochs=4), model=ModelConfig(k=1), seed=5)
    assert a.differences(b) == ["recipe.epochs: 3 -> 4", "seed: 0 -> 5"]
    assert a.differences(a) == []
