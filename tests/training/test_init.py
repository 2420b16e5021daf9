"""Runs that start from a file (`--init`)."""

import dataclasses
import json

import pytest
import torch

from pmm.artifacts.checkpoint import load
from pmm.artifacts.describe import describe_artifact
from pmm.config import Config
from pmm.training.flags import TrainOptions
from pmm.training.launch import train
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, run_here

ON_CPU = TrainOptions(device="cpu")


def changed(config, *, init, **recipe):
    """Other identities than those of `trained`, crops of half the height and width for speed, and a frozen backbone."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, val_identities=0.0, height=64, width=32),
        model=dataclasses.replace(config.model, init=str(init)),
        recipe=dataclasses.replace(config.recipe, freeze_backbone=1, **recipe),
    )


def test_a_run_goes_on_from_other_identities_and_needs_the_file_once(
    small_config, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("pmm.training.trainer.log_mix_picture", lambda *args: None)  # which takes as long as an epoch
    file, out = tmp_path / "start.pth", tmp_path / "run"
    file.write_bytes(trained.read_bytes())
    train(changed(small_config, init=file, epochs=1), out, ON_CPU)
    said, before, after = capsys.readouterr().out, load(trained), load(out / "last.pth")
    assert before["config"]["model"]["num_classes"] == 9
    assert after["config"]["model"]["num_classes"] == 12
    backbone = [key for key in before["model"] if key.startswith("backbone.")]
    assert all(torch.equal(after["model"][key], before["model"][key]) for key in backbone)  # it was frozen
    table = [line for line in said.splitlines() if line.startswith("init: ")]
    assert str(file) in table[0]
    assert any("taken" in line and f" {len(backbone)} " in line for line in table)
    assert any("new" in line and "9 of synthetic there, 12 of synthetic here" in line for line in table)
    assert f"from {file}" in said
    assert after["versions"]["init"] == sha256(file)

    assert describe_artifact(out / "last.pth", "checkpoint")["backbone_weights"] == "start.pth"  # no folders of a user
    file.unlink()
    saved = Config.from_dict(json.loads((out / "config.json").read_text()))
    more = dataclasses.replace(saved, recipe=dataclasses.replace(saved.recipe, epochs=2))
    train(more, out, TrainOptions(device="cpu", resume=True, extend=True))
    last = load(out / "last.pth")
    assert last["epoch"] == 2
    assert last["versions"]["init"] == after["versions"]["init"]
    assert last["config"]["model"]["init"] == str(file)
    assert "init: " not in capsys.readouterr().out


@pytest.mark.parametrize("resumed", [False, True])
def test_what_cannot_be_a_start_is_refused_before_anything_is_drawn_or_written(trained, tmp_path, resumed):
    people, out = tmp_path / "people", tmp_path / "run"
    flags = ["-m", "pmm.train", "--preset", "tiny", "--root", people, "--device", "cpu", "--out", out]
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    if resumed:
        done = run_here(*flags[:2], "--resume", "--out", trained.parent, "--init", tmp_path / "other.pth")
        assert_one_line_error(done, str(trained.parent), "model.init", "other.pth")
        return
    for file, fact in (("other.pth", "no weights of a resnet10 backbone"), ("missing.pth", "--init FILE")):
        done = run_here(*flags, "--init", tmp_path / file)
        assert_one_line_error(done, str(tmp_path / file), fact)
        assert done.returncode == 1
    done = run_here(*flags, "--backbone", "resnet50", "--init", trained)
    assert_one_line_error(done, str(trained), "--backbone resnet10")
    done = run_here(*flags, "--init", trained, "--weights", "imagenet")
    assert_one_line_error(done, "--init", "--weights imagenet")
    assert done.returncode == 2
    assert not people.exists()
    assert not out.exists()
