import dataclasses

import pytest
import torch

from pmm.config import Config
from pmm.data.samples import ReidDataset
from pmm.presets import preset
from pmm.training.announce import Announcer

CPU = torch.device("cpu")
NOTE = "note: the backbone starts from random weights, "


def config_of(dataset: str, backbone: str, weights: str) -> Config:
    base = preset("tiny")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, dataset=dataset),
        model=dataclasses.replace(base.model, backbone=backbone, weights=weights),
    )


@pytest.mark.parametrize(
    ("dataset", "backbone", "weights", "epoch", "noted"),
    [
        ("synthetic", "resnet50", "none", 0, True),
        ("synthetic", "resnet50", "none", 1, False),
        ("synthetic", "resnet50", "imagenet", 0, False),
        ("synthetic", "resnet10", "none", 0, False),
        ("market1501", "resnet50", "none", 0, False),
    ],
)
def test_random_weights_that_could_be_others_are_noted_once(capsys, tmp_path, dataset, backbone, weights, epoch, noted):
    split = ReidDataset(train=(), query=(), gallery=(), notes=("a note of the reader",))
    announcer = Announcer(config_of(dataset, backbone, weights), split, tmp_path)
    announcer.start(torch.nn.Linear(1000, 1000), CPU, world=2, epoch=epoch, step=0)
    out = capsys.readouterr().out
    assert (NOTE in out and "--weights imagenet" in out) is noted
    assert "note: a note of the reader\n" in out
    assert f"on {backbone} (1.00 M parameters), cpu x 2 processes\n" in out
    assert ("from scratch" if epoch == 0 else "resumed at epoch 2,") in out
