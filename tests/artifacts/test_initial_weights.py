"""What a training starts from: each key of the file and of the model is accounted for."""

import dataclasses
import re

import pytest
import torch
from torchvision.models import resnet50

from pmm.artifacts.checkpoint import load
from pmm.artifacts.init_file import read_init_file
from pmm.artifacts.initial_weights import load_initial_weights
from pmm.config import Config, ModelConfig
from pmm.models.registry import build_model
from pmm.utils.errors import ConflictingOptions, InvalidFile, UserError
from tests.refusals import refuses


def config_of(saved, **changes):
    config = Config.from_dict(load(saved)["config"])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def started(source, config):
    """A new model, the same before it was started from `source`, and the rows of the table: (verb, count, rest)."""
    torch.manual_seed(5)
    model = build_model(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = load_initial_weights(model, config, read_init_file(source, config.model.backbone))
    lines = [re.fullmatch(r"init: (taken|left out|new) +(\d+)  (.+)", line) for line in table.splitlines()[1:]]
    return model.state_dict(), before, [(line[1], int(line[2]), line[3]) for line in lines]


def total(rows, *verbs):
    return sum(count for verb, count, _ in rows if verb in verbs)


def leaves(value):
    return sum(map(leaves, value.values())) if isinstance(value, dict) and value else 1


def test_none_changes_nothing():
    config = Config(model=ModelConfig(backbone="resnet10", weights="none", num_classes=3))
    model = build_model(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_initial_weights(model, config, None) == ""
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({}, ""),
        ({"num_classes": 5}, r"stages\.\d\.classifier\."),
        ({"feature_dim": 32}, r"stages\."),
        ({"method": "bdb"}, r"stages\.1\."),
        ({"method": "baseline"}, ""),
        ({"neck": "bn"}, r"stages\."),
    ],
)
def test_what_fits_of_a_checkpoint_is_taken_and_the_rest_said(trained, changes, new):
    config, saved = config_of(trained, **changes), load(trained)
    state, before, rows = started(trained, config)
    for key, value in state.items():
        renewed = bool(new and re.match(new, key))
        assert torch.equal(value, before[key] if renewed else saved["model"][key]), key
    count = sum(bool(new and re.match(new, key)) for key in state)
    assert total(rows, "new") == count
    assert total(rows, "taken") == len(state) - count
    assert total(rows, "taken", "left out") == leaves(saved)


def test_classifiers_of_other_people_are_new_though_they_are_as_many(trained):
    config = config_of(trained)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset="market1501"))
    state, before, rows = started(trained, config)
    classifiers = [key for key in state if ".classifier." in key]
    assert all(torch.equal(state[key], before[key]) for key in classifiers)
    reason = f"{config.model.num_classes} of synthetic there, {config.model.num_classes} of market1501 here"
    assert [(verb, count) for verb, count, text in rows if reason in text] == [("left out", 6), ("new", 6)]


def test_classifiers_are_taken_for_the_same_people_alone(trained, tmp_path):
    base, init = config_of(trained), dataclasses.replace(read_init_file(trained, "resnet10"), path=tmp_path / "run.pth")
    model = build_model(base)
    (tmp_path / "siteA").mkdir()

    def config(val=0.25, seed=0, **data):
        data = dataclasses.replace(base.data, val_identities=val, **data)
        return dataclasses.replace(base, seed=seed, data=data)

    def taken(there, here):
        table = load_initial_weights(model, here, dataclasses.replace(init, config=there))
        return "classifiers of other identities" not in table

    site = str(tmp_path / "siteA")
    assert taken(config(), config(root="moved"))
    assert not taken(config(), config(synthetic_seed=9))
    assert not taken(config(), config(synthetic_ids=9))
    assert not taken(config(), config(seed=1))  # others are held out
    assert not taken(config(), config(val=0.26))
    assert taken(config(val=0.0), config(val=0.0, seed=1))
    assert taken(config(dataset="market1501", root="a"), config(dataset="market1501", root="b"))
    assert taken(config(dataset="folder", root="siteA"), config(dataset="folder", root=site))  # seen from the file
    assert not taken(config(dataset="folder", root=site), config(dataset="folder", root=str(tmp_path / "siteB")))


def test_classifiers_of_an_imported_checkpoint_are_of_nobody_knows_whom(trained, tmp_path):
    saved = load(trained)
    torch.save({**saved, "versions": {**saved["versions"], "imported": "0" * 64}}, tmp_path / "imported.pth")
    state, before, rows = started(tmp_path / "imported.pth", config_of(trained))
    for key, value in state.items():
        assert torch.equal(value, before[key] if ".classifier." in key else saved["model"][key]), key
    assert total(rows, "taken", "left out") == leaves(saved) + 1


def test_averaged_weights_are_those_that_are_taken(trained, tmp_path):
    saved = load(trained.with_name("last.pth"))
    averages = {key: value + 1 for key, value in saved["model"].items()}
    torch.save({**saved, "ema": {"steps": 3, "model": averages}}, tmp_path / "ema.pth")
    state, _, rows = started(tmp_path / "ema.pth", config_of(trained))
    assert all(torch.equal(value, saved["model"][key] + 1) for key, value in state.items())
    assert ("left out", len(state)) in [(verb, count) for verb, count, text in rows if "another copy" in text]


def test_names_in_a_file_cannot_draw_on_the_terminal(trained, tmp_path):
    name = "\x1b[31mevil\ninit: taken 99  all"
    torch.save({**load(trained), name: torch.zeros(1)}, tmp_path / "evil.pth")
    _, _, rows = started(tmp_path / "evil.pth", config_of(trained))
    assert [text for *_, text in rows if "\\x1b[31mevil\\ninit: taken 99  all" in text]


def test_another_backbone_is_refused_and_named(trained):
    with refuses(InvalidFile, "resnet10", path=trained, expected="resnet50", hint="--backbone resnet10"):
        read_init_file(trained, "resnet50")


def test_imagenet_is_for_backbones_that_have_it():
    config = Config(model=ModelConfig(backbone="resnet10", weights="imagenet", num_classes=3))
    with refuses(ConflictingOptions, "imagenet", "resnet10", hint="--init FILE", options=("--weights",)):
        load_initial_weights(build_model(config), config, None)


def test_timms_weights_are_timms(monkeypatch):
    pytest.importorskip("timm")
    config = Config(
        model=ModelConfig(backbone="timm:test_resnet", weights="imagenet", method="baseline", num_classes=3)
    )
    model = build_model(config)
    theirs = {key: value + 1 for key, value in model.backbone.net.state_dict().items()}
    monkeypatch.setattr("pmm.models.timm_network.imagenet_state", lambda name: {"test_resnet": theirs}[name])
    assert load_initial_weights(model, config, None) == ""
    assert all(torch.equal(value, theirs[key]) for key, value in model.backbone.net.state_dict().items())


IMAGENET = Config(model=ModelConfig(method="baseline", weights="imagenet", num_classes=3))


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path, error):
    def offline(*args, **kwargs):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with torch.device("meta"):
        model = build_model(IMAGENET)
    with refuses(UserError, "--weights imagenet", error, hint="--init FILE"):
        load_initial_weights(model, IMAGENET, None)


def test_a_damaged_download_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half")
    with torch.device("meta"):
        model, net = build_model(IMAGENET), resnet50(weights=None)
    model.to_empty(device="cpu")
    state = {
        key: torch.tensor(place).to(value.dtype).expand(value.shape)
        for place, (key, value) in enumerate(net.state_dict().items())
    }
    with refuses(InvalidFile, "truncated", path=kept, expected="--weights imagenet", hint="remove that file"):
        load_initial_weights(model, IMAGENET, None)
    torch.save(state, kept)
    load_initial_weights(model, IMAGENET, None)
    assert torch.equal(model.backbone.trunk.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.backbone.layer4[2].bn3.running_var, state["layer4.2.bn3.running_var"])
