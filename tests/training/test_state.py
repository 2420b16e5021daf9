"""The state of a training: its optimizer, what is frozen, and what a checkpoint brings back."""

import dataclasses
import io
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from pmm.artifacts.checkpoint import deployed_weights, for_deployment, restore_model
from pmm.data.loader import train_batches
from pmm.data.readers import read_dataset
from pmm.models.registry import METHODS, build_model
from pmm.presets import with_method
from pmm.recipe import RecipeConfig
from pmm.training.snapshot import restore_training, snapshot
from pmm.training.state import (
    check_network_on,
    in_train_mode,
    learning_rate,
    make_train_state,
    weight_groups,
)
from pmm.training.step import train_step
from pmm.utils.errors import BackendUnavailable, InvalidFile
from tests.refusals import refuses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(small_config):
    """Crops of half the height and width, for speed."""
    return dataclasses.replace(
        small_config,
        data=dataclasses.replace(small_config.data, height=64, width=32),
        model=dataclasses.replace(small_config.model, num_classes=12),
        recipe=dataclasses.replace(small_config.recipe, batch_size=16),
    )


@pytest.fixture(scope="module")
def batch(config, people):
    loader, _ = train_batches(read_dataset("synthetic", people).train, config)
    return next(iter(loader))


def changed(config, **recipe):
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **recipe))


def fresh(config, epoch=1):
    torch.manual_seed(0)
    return in_train_mode(make_train_state(build_model(config), config, CPU, 10), epoch)


def weights(state):
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def apart(before, after):
    """Names of what differs."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def copied(saved):
    """As it comes from a file."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_is_fused_and_stays_so_where_its_state_is_loaded(config, batch, optimizer):
    config = changed(config, optimizer=optimizer)
    state, resumed = fresh(config), fresh(config)
    train_step(state, batch)
    restore_training(copied(snapshot(state, 0, -1.0)), resumed, Path("last.pth"))
    for each in (state, resumed):
        groups = each.optimizer.param_groups
        assert {(group["fused"], group["foreach"]) for group in groups} == {(True, None)}
        assert len(groups) == (4 if optimizer == "adamw" else 2)
        assert each.lr == learning_rate(config.recipe, 1, 10)
        train_step(each, batch, step=1)
        assert not apart(weights(state), weights(each))


def with_one_group(saved):
    first, second = saved["optimizer"]["param_groups"]
    saved["optimizer"]["param_groups"] = [{**first, "params": first["params"] + second["params"]}]


@pytest.mark.parametrize("damage", [with_one_group, lambda saved: saved["optimizer"].pop("param_groups")])
def test_the_optimizer_of_another_version_is_refused(config, batch, damage):
    state = fresh(config)
    train_step(state, batch)
    saved = copied(snapshot(state, 0, -1.0))
    damage(saved)
    with refuses(InvalidFile, "param", path=Path("last.pth"), hint="--init"):
        restore_training(saved, fresh(config), Path("last.pth"))


def test_fused_adam_is_adam(config, batch):
    fused, plain = fresh(config), fresh(config)
    groups = [{"params": group["params"]} for group in plain.optimizer.param_groups]
    adam = torch.optim.Adam(groups, lr=1.0, weight_decay=config.recipe.weight_decay, fused=False, foreach=False)
    for step in range(3):
        train_step(fused, batch, step=step)
        for ours, theirs in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        for group in adam.param_groups:
            group["lr"] = learning_rate(config.recipe, step, 10)
        adam.step()
    for ours, theirs in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", get_args(get_type_hints(RecipeConfig)["optimizer"]))
@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_in_one_group_and_with_adamw_vectors_do_not_decay(config, method, optimizer):
    config = changed(with_method(config, method), optimizer=optimizer)
    model = build_model(config)
    groups = weight_groups(model, config.recipe)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert sorted(id(weight) for group in groups for weight in group.weights) == sorted(names)
    assert not groups[-1].backbone  # whose rate is shown
    for group in groups:
        for weight in group.weights:
            assert names[id(weight)].startswith("backbone.") == group.backbone
            assert group.decays == (optimizer != "adamw" or weight.dim() > 1)
    kept = [names[id(weight)] for group in groups if not group.decays for weight in group.weights]
    modules = dict(model.named_modules())
    norms = {name for name, module in modules.items() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert all(name.endswith(".bias") or name.rpartition(".")[0] in norms for name in kept)
    assert bool(kept) == (optimizer == "adamw")


def test_adamw_is_that_of_torch(config, batch):
    """In its usual form, with a group for each weight."""
    config = changed(config, optimizer="adamw", weight_decay=0.5, backbone_lr=0.1)
    ours, theirs = fresh(config), fresh(config)
    groups = [
        {"params": [weight], "weight_decay": 0.0 if weight.dim() <= 1 else 0.5, "name": name}
        for name, weight in theirs.model.named_parameters()
    ]
    adamw = torch.optim.AdamW(groups, fused=False, foreach=False)
    for step in range(3):
        train_step(ours, batch, step=step)
        for group, weight in zip(adamw.param_groups, ours.model.parameters(), strict=True):
            group["params"][0].grad = None if weight.grad is None else weight.grad.clone()
            factor = 0.1 if group["name"].startswith("backbone.") else 1.0
            group["lr"] = factor * learning_rate(config.recipe, step, 10)
        adamw.step()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_backbone_has_a_learning_rate_of_its_own(config, batch):
    slow, same = fresh(changed(config, backbone_lr=0.1)), fresh(config)
    before = weights(same)
    for state in (slow, same):
        train_step(state, batch)
    for name, value in same.model.named_parameters():
        moved, slower = value - before[name], dict(slow.model.named_parameters())[name] - before[name]
        factor = 0.1 if name.startswith("backbone.") else 1.0
        torch.testing.assert_close(slower, factor * moved, rtol=1e-3, atol=1e-7)
    assert slow.lr == same.lr


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_backbone_does_not_change_and_all_else_does(config, batch, method):
    state = fresh(changed(with_method(config, method), freeze_backbone=1))
    before = weights(state)
    losses = train_step(state, batch)
    assert losses["loss"].isfinite()
    differing = apart(before, weights(state))
    assert not any(name.startswith("backbone.") for name in differing)
    parameters = {name for name, value in state.model.named_parameters() if value.requires_grad}
    assert parameters <= differing
    state = in_train_mode(state, 2)
    train_step(state, batch, epoch=2)
    thawed = apart(before, weights(state))
    assert {name for name in before if name.startswith("backbone.")} <= thawed


def test_parts_of_a_batch_with_a_frozen_backbone(config, batch):
    state = fresh(changed(config, freeze_backbone=1, accumulate=2))
    before = weights(state)
    train_step(state, batch)
    assert not any(name.startswith("backbone.") for name in apart(before, weights(state)))


def test_averages_are_saved_resumed_and_deployed(config, batch):
    config = changed(config, ema=0.9)
    state, resumed = fresh(config), fresh(config)
    for step in range(2):
        train_step(state, batch, step=step)
    saved = snapshot(state, 0, -1.0)
    assert apart(weights(state), saved["ema"]["model"])
    deployed = {key: value.clone() for key, value in state.deployed.state_dict().items()}
    restored = restore_model(copied(saved), "last.pth")[0].state_dict()
    for found in (deployed_weights(saved), for_deployment(saved)["model"], restored):
        assert not apart(deployed, found)
    restore_training(copied(saved), resumed, Path("last.pth"))
    for each in (state, resumed):
        train_step(each, batch, step=2)
    assert not apart(state.deployed.state_dict(), resumed.deployed.state_dict())
    assert resumed.ema.steps == state.ema.steps == 3
    assert apart(deployed, state.deployed.state_dict())


def test_a_run_goes_on_in_another_precision(config, batch):
    """From one that scales its loss to one that does not, and back."""
    for before, after in (("fp16", "off"), ("off", "fp16")):
        state, resumed = fresh(changed(config, amp=before)), fresh(changed(config, amp=after))
        restore_training(copied(snapshot(state, 0, -1.0)), resumed, Path("last.pth"))
        assert resumed.scaler.is_enabled() == (after == "fp16")
        assert not apart(weights(state), weights(resumed))


def test_an_extended_run_has_the_learning_rate_of_all_its_epochs(config, batch):
    state = fresh(config)
    for _ in range(12):
        state.optimizer.step()
        state.scheduler.step()
    longer = fresh(changed(config, epochs=20))
    restore_training(copied(snapshot(state, 1, -1.0)), longer, Path("last.pth"))
    assert longer.lr == learning_rate(longer.config.recipe, 12, 10) != state.lr


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "trained"), [(3, 1, 2, False), (16, 1, 2, True), (3, 3, 2, True)]
)
def test_a_network_that_a_cpu_cannot_train_is_refused(channels, kernel, stride, trained):
    network = torch.nn.Sequential(torch.nn.Conv2d(channels, 8, kernel, stride))
    check_network_on(torch.device("cuda"), network)
    if trained:
        check_network_on(torch.device("cpu"), network)
    else:
        with refuses(BackendUnavailable, "3 channels", hint="--backbone"):
            check_network_on(torch.device("cpu"), network)
