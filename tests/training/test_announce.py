import dataclasses
from types import SimpleNamespace

import pytest
import torch

from pmm.config import Config
from pmm.data.samples import ReidDataset
from pmm.presets import preset
from pmm.training.announce import Announcer

CPU = torch.device("cpu")
NOTE = "note: the backbone starts from random weights"


def config_of(dataset: str, backbone: str, weights: str) -> Config:
    base = preset("tiny")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, dataset=dataset),
        model=dataclasses.replace(base.model, backbone=backbone, weights=weights),
    )


def started(config, out, capsys, *, asked="off", epoch=0, world=1):
    """What the start of a run prints."""
    split = ReidDataset(train=(), query=(), gallery=(), notes=("a note of the reader",))
    announcer = Announcer(config, split, out, asked)
    announcer.start(torch.nn.Linear(1000, 1000), CPU, world=world, epoch=epoch, step=0)
    out, err = capsys.readouterr()
    assert all(line.startswith("pmm train: note: ") for line in err.splitlines())
    return out + err


@pytest.mark.parametrize(
    ("dataset", "backbone", "weights", "epoch", "advice"),
    [
        ("synthetic", "resnet50", "none", 0, "--weights imagenet"),
        ("synthetic", "resnet50", "none", 1, ""),
        ("synthetic", "resnet50", "imagenet", 0, ""),
        ("synthetic", "resnet10", "none", 0, ""),
        ("market1501", "resnet50", "none", 0, ""),
        ("market1501", "resnet50-ibn-a", "none", 0, "--init FILE"),
        ("synthetic", "resnet50-ibn-a", "none", 0, "--init FILE"),
        ("market1501", "resnet50-ibn-a", "none", 1, ""),
    ],
)
def test_random_weights_that_could_be_others_are_noted_once(
    capsys, tmp_path, dataset, backbone, weights, epoch, advice
):
    out = started(config_of(dataset, backbone, weights), tmp_path, capsys, epoch=epoch, world=2)
    assert (NOTE in out) is bool(advice)
    assert advice in out
    assert "note: a note of the reader\n" in out
    assert f"on {backbone} (1.00 M parameters), cpu x 2 processes\n" in out
    assert ("from scratch" if epoch == 0 else "resumed at epoch 2,") in out


def test_the_learning_rate_of_the_backbone_is_told_where_it_differs(capsys, tmp_path):
    config = config_of("synthetic", "resnet10", "none")
    assert "learning rate:" not in started(config, tmp_path, capsys)
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, lr=0.25, backbone_lr=0.5, epochs=1))
    out = started(config, tmp_path, capsys)
    assert "learning rate: at most 0.25, of the backbone 0.12" in out
    assert ", 1 epoch)" in out


def test_names_in_a_resumed_run_cannot_draw_on_the_terminal(capsys, tmp_path):
    config, name = config_of("synthetic", "resnet10", "none"), "\x1b[31mevil\nnote: all is well"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=name))
    out = started(dataclasses.replace(config, model=dataclasses.replace(config.model, init=name)), tmp_path, capsys)
    assert "\x1b" not in out
    assert "\nnote: all" not in out
    assert out.count(r"\x1b[31mevil\nnote: all is well") >= 4


def test_a_frozen_backbone_of_random_weights_is_noted(capsys, tmp_path):
    config = config_of("synthetic", "resnet10", "none")
    frozen = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, freeze_backbone=5))
    out = started(frozen, tmp_path, capsys)
    assert NOTE in out
    assert "--freeze-backbone 5 keeps; --init FILE" in out
    from_a_file = dataclasses.replace(frozen, model=dataclasses.replace(config.model, init="weights.pth"))
    assert NOTE not in started(from_a_file, tmp_path, capsys)


@pytest.mark.parametrize(
    ("before", "after", "facts"),
    [(2, 2, ["backbone", "from epoch 3"]), (2, 3, ["backbone", "stays"]), (1, 1, []), (0, 0, [])],
)
def test_what_becomes_of_a_frozen_backbone_of_an_extended_run_is_noted(capsys, tmp_path, before, after, facts):
    config = config_of("synthetic", "resnet10", "none")
    old = dataclasses.replace(config.recipe, epochs=2, freeze_backbone=before)
    config = dataclasses.replace(config, recipe=dataclasses.replace(old, epochs=3, freeze_backbone=after))
    state = SimpleNamespace(config=config, scheduler=SimpleNamespace(last_epoch=2), steps_per_epoch=1, lr=1.0)
    Announcer(config, ReidDataset(train=(), query=(), gallery=()), tmp_path, "off").resume(old, state)
    _, *rest = capsys.readouterr().err.splitlines()
    assert len(rest) == bool(facts)
    assert all(fact in rest[0] for fact in facts)


@pytest.mark.parametrize(("asked", "amp", "line"), [("off", "off", "fp32\n"), ("auto", "bf16", "bf16 (--amp auto: ")])
def test_the_precision_is_announced_and_why(capsys, tmp_path, asked, amp, line):
    config = config_of("synthetic", "resnet10", "none")
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, amp=amp))
    assert f"precision: {line}" in started(config, tmp_path, capsys, asked=asked)


@pytest.mark.parametrize(
    ("epoch", "warned"), [(13, False), (14, True), (60, True), (73, False), (74, True), (120, True)]
)
def test_features_may_be_one_point_while_the_rate_of_a_phase_rises(tmp_path, caplog, epoch, warned):
    """Of two trainings of 60 epochs, each rising for 22 %."""
    base = preset("tiny", "aos")
    recipe, model = dataclasses.replace(base.recipe, epochs=120), dataclasses.replace(base.model, num_classes=10)
    split = ReidDataset(train=(), query=(), gallery=())
    announcer = Announcer(dataclasses.replace(base, recipe=recipe, model=model), split, tmp_path, "off")
    announcer.warn({"epoch": epoch, "cross_entropy1": 2.3, "data_seconds": 0.0, "seconds": 1.0}, {}, 1)
    assert ("collapsed" in caplog.text) == warned
