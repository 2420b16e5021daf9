"""What is written when, and that a file holds the state of the call whatever the training does meanwhile."""

import dataclasses
import json
import threading
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import pmm.training.trainer
from pmm.artifacts import checkpoint
from pmm.artifacts.checkpoint import KEYS
from pmm.training.flags import TrainOptions
from pmm.training.launch import train
from pmm.training.saver import Saver
from pmm.utils.errors import CannotWrite, TrainingInterrupted
from tests.refusals import refuses

CPU = torch.device("cpu")
EPOCH_S = 1.3


def a_state(epoch, device=CPU):
    """Of a convolution as training holds it, filled with `epoch`."""
    weight = torch.full((4, 3, 3, 3), float(epoch), device=device).to(memory_format=torch.channels_last)
    moments = {
        "state": {0: {"exp_avg": weight + 1, "step": torch.tensor(3.0)}},
        "param_groups": [{"betas": (0.9, 0.99)}],
    }
    rest = {"format": "pmm-checkpoint-1", "config": {}, "versions": {}, "best": -1.0}
    rest |= {"optimizer": moments, "epoch": epoch}
    return dict.fromkeys(KEYS) | rest | {"model": {"weight": weight}}


class Writes:
    """In place of `checkpoint.save`: what is written, once `go` is set."""

    def __init__(self, monkeypatch):
        self.files, self.go, self.begun, self.save = [], threading.Event(), threading.Event(), checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, path, state):
        self.begun.set()
        assert self.go.wait(10)
        self.files.append((path.name, state["epoch"]))
        self.save(path, state)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_file_holds_the_state_of_the_call(tmp_path, monkeypatch, device):
    writes = Writes(monkeypatch)
    with closing(Saver(tmp_path, 1.0, torch.device(device))) as saver:
        for epoch in (1, 2):  # the second in the memory of the first
            writes.go.clear()
            state = a_state(epoch, device)
            saver.save_last(state)
            saver.save_best(state)
            for tensor in (state["model"]["weight"], state["optimizer"]["state"][0]["exp_avg"]):
                tensor.fill_(-1)
            writes.go.set()
            saver.wait()
            last, best = (checkpoint.load(tmp_path / name) for name in ("last.pth", "best.pth"))
            weight, moment = last["model"]["weight"], last["optimizer"]["state"][0]["exp_avg"]
            assert weight.unique().tolist() == best["model"]["weight"].unique().tolist() == [epoch]
            assert moment.unique().tolist() == [epoch + 1]
            # what is resumed has the layout that it had; what is deployed has torch's own
            assert moment.stride() == state["optimizer"]["state"][0]["exp_avg"].stride() != weight.stride()
            assert weight.is_contiguous()
            assert best["model"]["weight"].is_contiguous()
            assert last["optimizer"]["param_groups"] == [{"betas": (0.9, 0.99)}]
            assert best["optimizer"] is None


def test_one_write_at_a_time_and_the_newest_best_model_waits_for_it(tmp_path, monkeypatch):
    writes, clock = Writes(monkeypatch), [0.0]
    with closing(Saver(tmp_path, 1.0, CPU, lambda: clock[0])) as saver:
        assert not saver.due
        clock[0] = 61.0
        assert saver.due
        saver.save_last(a_state(1))
        assert writes.begun.wait(10)
        for epoch in (2, 3, 4):
            saver.save_best(a_state(epoch))
        clock[0] = 200.0
        assert not saver.due  # its memory is that of the write that goes on
        writes.go.set()
        saver.save_now(a_state(5))
        assert writes.files == [("last.pth", 1), ("best.pth", 4), ("last.pth", 5)]
        saver.save_now(a_state(6), best=True)
        assert writes.files[3:] == [("best.pth", 6), ("last.pth", 6)]
        clock[0] = 259.0
        assert not saver.due
        clock[0] = 261.0
        assert saver.due
        writes.go.clear()
        saver.save_best(a_state(7))
        assert saver.due  # best models alone, one after the other, do not keep last.pth from being written
        saver.save_last(a_state(7))
        saver.save_best(a_state(8))
        writes.go.set()
        saver.wait()
        assert writes.files[5:] in (
            [("best.pth", 7), ("last.pth", 7), ("best.pth", 8)],  # what last.pth knows of is on the disk before it
            [("best.pth", 8), ("last.pth", 7)],  # or a later one
        )


def test_a_write_that_fails_is_told_at_the_next_look(tmp_path, monkeypatch):
    writes = Writes(monkeypatch)
    writes.go.set()
    (tmp_path / "best.pth").mkdir()  # no file can take its place
    with closing(Saver(tmp_path, 1e-9, CPU)) as saver:
        for save in (saver.save_last, saver.save_best):
            saver.save_best(a_state(1))
            saver._writes[0].exception()
            assert saver.failed
            with refuses(CannotWrite, "folder", path=tmp_path / "best.pth"):
                save(a_state(2))
            assert not saver.failed
        saver.save_last(a_state(3))
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 3


def test_whatever_ends_the_run_files_are_whole(tmp_path, monkeypatch):
    writes = Writes(monkeypatch)

    def interrupted(saver):
        saver.save_last(a_state(1))
        saver.save_best(a_state(2))
        threading.Timer(0.05, writes.go.set).start()
        raise KeyboardInterrupt

    others = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), closing(Saver(tmp_path, 1.0, CPU)) as saver:
        interrupted(saver)
    assert {path.name: checkpoint.load(path)["epoch"] for path in tmp_path.iterdir()} == {"last.pth": 1, "best.pth": 2}
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("saver")]


class Run:
    """400 epochs of `EPOCH_S` of one step each on a clock of its own, without data, steps or files."""

    def __init__(self, monkeypatch, *, minutes, stop_at=0, val_every=0, full_at=0):
        self.full_at = full_at
        self.clock, self.minutes, self.stop_at, self.val_every, self.saved = 0.0, minutes, stop_at, val_every, []
        self.epochs, self.first, self.skipped, self.close = range(0), 0, {}, lambda: None
        trainer = pmm.training.trainer
        monkeypatch.setattr(trainer, "train_batches", lambda *args, **kwargs: (self, self))
        monkeypatch.setattr(trainer, "train_step", self.step)
        monkeypatch.setattr(trainer, "Saver", partial(Saver, clock=lambda: self.clock))
        monkeypatch.setattr(trainer, "log_mix_picture", lambda *args: None)
        monkeypatch.setattr("pmm.training.validation.Validation", lambda *args, **kwargs: self)
        monkeypatch.setattr(checkpoint, "save", self.save)

    def __len__(self):
        return 1

    def __iter__(self):
        for _ in self.epochs:
            yield SimpleNamespace(indices=torch.zeros(1), labels=torch.zeros(1))

    def step(self, state, batch, **kwargs):
        self.clock += EPOCH_S
        return {"loss": torch.ones(()), "triplet1": torch.ones(()), "cross_entropy1": torch.ones(())}

    def evaluate(self, model, device):
        return SimpleNamespace(mAP=self.clock, rank1=0.5)  # the best so far, always

    def save(self, path, state):
        if path.name == "best.pth" and state["epoch"] == self.full_at:
            raise CannotWrite("the disk is full", path=path)
        weights = sum(value.nbytes for value in state["model"].values())
        self.saved.append((path.name, state["epoch"], weights if path.name == "best.pth" else 3 * weights))

    def train(self, config, out):
        data = dataclasses.replace(config.data, val_identities=0.25 if self.val_every else 0.0)
        recipe = dataclasses.replace(config.recipe, epochs=400, val_every=self.val_every or 1, ema=0.0)
        config = dataclasses.replace(config, data=data, recipe=recipe)
        options = TrainOptions(device="cpu", save_minutes=self.minutes)
        trainer = pmm.training.trainer.Trainer
        run = trainer.run
        stop = lambda: 15 if 0 < self.stop_at <= self.clock / EPOCH_S else 0  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "run", lambda self, pending_signal: run(self, stop))
            return train(config, out, options)

    def epochs_of(self, name):
        return [epoch for file, epoch, _ in self.saved if file == name]

    @property
    def share(self):
        """Of the bytes that would be written if each epoch wrote last.pth and best.pth."""
        weights = min(size for _, _, size in self.saved if size)
        return sum(size for _, _, size in self.saved) / (400 * (1 + 3) * weights)


def test_a_run_saves_by_the_clock_and_at_its_end(small_config, tmp_path, monkeypatch):
    run = Run(monkeypatch, minutes=2.0)
    run.train(small_config, tmp_path / "run")
    assert run.epochs_of("last.pth") == [0, 93, 186, 279, 372, 400]
    assert run.epochs_of("best.pth") == [400]
    assert run.share < 0.1
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == list(range(1, 401))


def test_a_run_saves_when_it_is_stopped(small_config, tmp_path, monkeypatch):
    run = Run(monkeypatch, minutes=10.0, stop_at=200)
    with pytest.raises(TrainingInterrupted):
        run.train(small_config, tmp_path / "run")
    assert run.epochs_of("last.pth") == [0, 200]
    assert run.epochs_of("best.pth") == [200]


def test_a_run_saves_its_best_model_alone(small_config, tmp_path, monkeypatch):
    run = Run(monkeypatch, minutes=10.0, val_every=10)
    run.train(small_config, tmp_path / "run")
    assert run.epochs_of("last.pth") == [0, 400]
    best = run.epochs_of("best.pth")  # all of 10, 20, ..., but those that waited when a better one came
    assert set(best) <= set(range(10, 401, 10))
    assert best == sorted(best)
    assert best[-1] == 400
    assert run.saved[-1][0] == "last.pth"
    assert run.share < 0.1


def test_a_write_that_fails_ends_the_run_at_its_next_step(small_config, tmp_path, monkeypatch):
    run = Run(monkeypatch, minutes=10.0, val_every=200, full_at=200)
    with refuses(CannotWrite, "full", path=tmp_path / "run" / "best.pth"):
        run.train(small_config, tmp_path / "run")
    assert 200 <= run.clock / EPOCH_S < 399  # not at the next save
    assert run.epochs_of("last.pth") == [0]
