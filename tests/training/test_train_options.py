"""Whole runs with the options that change how they go on: averages, a frozen backbone, more epochs, another machine."""

import dataclasses
import json
import shutil
import signal
import sys

import pytest
import torch

import pmm.training.trainer
from pmm.artifacts.checkpoint import load
from pmm.config import Config
from pmm.training.flags import TrainOptions
from pmm.training.launch import train
from pmm.training.state import learning_rate
from pmm.utils.errors import BackendUnavailable, TrainingInterrupted
from tests.refusals import refuses

ON_CPU, RESUMED = TrainOptions(device="cpu"), TrainOptions(device="cpu", resume=True)
EXTENDED = dataclasses.replace(RESUMED, extend=True)


@pytest.fixture(scope="module")
def config(small_config):
    """Crops of half the height and width, for speed."""
    return dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, height=64, width=32))


def changed(config, **recipe):
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **recipe))


def saved_in(out):
    return Config.from_dict(json.loads((out / "config.json").read_text()))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def lines_with(text, *facts):
    return [line for line in text.splitlines() if all(fact in line for fact in facts)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_end(out, other):
    for name in ("best.pth", "last.pth"):
        ours, theirs = load(out / name), load(other / name)
        assert same(ours["model"], theirs["model"]), name
        assert ours["epoch"] == theirs["epoch"]
        if name == "last.pth" and ours["ema"]:
            assert same(ours["ema"]["model"], theirs["ema"]["model"])


def test_averages_and_a_frozen_backbone_resume_to_the_bit_and_the_test_split_changes_nothing(
    config, tmp_path, monkeypatch, capsys
):
    """Stopped within the frozen epoch, and after it; the test split is evaluated in the stopped run alone."""
    config = changed(config, ema=0.9, freeze_backbone=1, backbone_lr=0.5)
    whole, out, calls, original = tmp_path / "whole", tmp_path / "run", [], pmm.training.trainer.train_step
    train(config, whole, ON_CPU)
    assert "test mAP" not in capsys.readouterr().out

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 5):
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(pmm.training.trainer, "train_step", stopping)
    with pytest.raises(TrainingInterrupted, match="epoch 1/2, after step 2 "):
        train(changed(config, eval_every=1), out, ON_CPU)
    with pytest.raises(TrainingInterrupted, match="epoch 2/2, after step 2 "):
        train(saved_in(out), out, RESUMED)
    train(changed(saved_in(out), eval_every=5), out, RESUMED)  # at the end in any case
    assert len(calls) == 6
    assert_same_end(out, whole)
    last = load(out / "last.pth")
    assert not same(last["model"], last["ema"]["model"])
    assert capsys.readouterr().out.count("  test mAP 0.") == 2
    expected, found = records(whole), records(out)
    assert [record["val_mAP"] for record in found] == [record["val_mAP"] for record in expected]
    assert all(0 < record["test_mAP"] <= record["test_rank1"] <= 1 for record in found)
    assert not any("test_mAP" in record for record in expected)


def test_a_second_ctrl_c_ends_the_process_at_once(config, tmp_path, monkeypatch, capfd):
    """Without an exception, which might fall anywhere, in any library."""

    def interrupted(*args, **kwargs):
        (tmp_path / "run" / ".best.pth.12345678.pth").write_bytes(b"half")
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(pmm.training.trainer, "train_step", interrupted)
    monkeypatch.setattr("os._exit", sys.exit)
    try:
        with pytest.raises(SystemExit, match="130"):
            train(config, tmp_path / "run", ON_CPU)
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"{tmp_path / 'run'}: interrupted" in capfd.readouterr().err
    assert {path.name for path in (tmp_path / "run").glob("*.pth")} == {"last.pth"}
    assert load(tmp_path / "run" / "last.pth")["epoch"] == 0


def test_a_finished_run_is_extended(trained, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(trained.parent, tmp_path / "run", copy_function=shutil.copyfile)
    longer = changed(saved_in(out), epochs=3)

    def killed(self, pending_signal):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pmm.training.trainer.Trainer, "_train_epochs", killed)  # before anything is saved
        with pytest.raises(KeyboardInterrupt):
            train(longer, out, EXTENDED)
    assert saved_in(out).recipe.epochs == 3
    assert load(out / "last.pth")["config"]["recipe"]["epochs"] == 2
    train(saved_in(out), out, RESUMED)
    next_rate, last_rate = (
        learning_rate(longer.recipe, 6, 3),
        learning_rate(dataclasses.replace(longer.recipe, epochs=2), 5, 3),
    )
    facts = ("from 2 to 3 epochs", f"{next_rate:.2g}", f"{last_rate:.2g}")
    assert len(lines_with(capsys.readouterr().err, "note:", *facts)) == 2
    assert [record["epoch"] for record in records(out)] == [1, 2, 3]
    last = load(out / "last.pth")
    assert (last["epoch"], last["config"]["recipe"]["epochs"]) == (3, 3)
    assert last["scheduler"]["last_epoch"] == 9
    assert last["best"] == max(record["val_mAP"] for record in records(out))


def test_a_run_goes_on_in_another_precision_and_says_so(trained, tmp_path, monkeypatch, capsys):
    def has_bf16(answer):
        monkeypatch.setattr("pmm.training.precision.cpu_has_bf16", lambda: answer)
        monkeypatch.setattr("pmm.training.precision.bf16_speedup", lambda: 2.0)

    out = shutil.copytree(trained.parent, tmp_path / "run", copy_function=shutil.copyfile)
    state = load(out / "last.pth")
    torch.save({**state, "epoch": 1}, out / "last.pth")
    has_bf16(True)  # emulated on another machine
    train(changed(saved_in(out), amp="auto"), out, RESUMED)
    said = capsys.readouterr()
    assert lines_with(said.err, "note:", "fp32", "bf16", "--amp")
    assert lines_with(said.out, "precision:", "bf16", "--amp auto", "this CPU")
    last = load(out / "last.pth")
    assert (last["config"]["recipe"]["amp"], last["versions"]["precision"]) == ("bf16", "bf16")
    assert saved_in(out).recipe.amp == "bf16"
    has_bf16(False)
    torch.save({**last, "epoch": 1}, out / "last.pth")
    with refuses(BackendUnavailable, "--amp bf16", "this CPU", hint="--amp auto"):
        train(saved_in(out), out, RESUMED)
    assert load(out / "last.pth")["epoch"] == 1


def test_emulated_bf16_is_refused_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr("pmm.training.precision.cpu_has_bf16", lambda: False)
    elsewhere = dataclasses.replace(config.data, root=str(tmp_path / "people"))
    with refuses(BackendUnavailable, "--amp bf16", hint="--amp auto"):
        train(dataclasses.replace(changed(config, amp="bf16"), data=elsewhere), tmp_path / "run", ON_CPU)
    assert not list(tmp_path.iterdir())
