"""Runs of PCB+RPP: what they say, what they leave, killed and by two processes, and what cannot be run."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from torch import nn

from pmm.artifacts.checkpoint import load
from pmm.artifacts.trained_model import load_model
from pmm.data.batches import normalize_batch
from pmm.data.loader import train_batches
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.models.registry import build_model, phases_of
from pmm.models.rpp import LEAST_PART
from pmm.presets import preset, with_method
from pmm.training import trainer
from pmm.training.announce import Announcer
from pmm.training.distributed import SINGLE, init_distributed
from pmm.training.flags import TrainOptions, saved_config
from pmm.training.launch import train
from pmm.training.saver import Saver
from pmm.training.state import in_train_mode, make_train_state
from pmm.training.step import train_step
from tests.conftest import assert_one_line_error, run_here
from tests.training.test_announce import started as announced
from tests.training.test_distributed import free_port
from tests.training.test_phases import config_of, same

CPU = torch.device("cpu")
ON_CPU, RESUMED = TrainOptions(device="cpu"), TrainOptions(device="cpu", resume=True)


def with_recipe(config, **recipe):
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **recipe))


@pytest.fixture(scope="module")
def config(small_config):
    """By the induced schedule, with averaged weights: an epoch for each of three phases, of three steps each."""
    return config_of(small_config, "induced", ema=0.5)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted run's folder."""
    out = tmp_path_factory.mktemp("rpp") / "run"
    train(config, out, ON_CPU)
    return out


def test_the_phases_are_told_at_the_start(capsys, tmp_path):
    for schedule, line in (
        ("authors", "phases: stripes in epochs 1 to 24, parts in epochs 25 to 60\n"),
        ("induced", "stripes in epochs 1 to 48, part classifier in epochs 49 to 52, parts in epochs 53 to 60\n"),
    ):
        config = with_recipe(preset("tiny", "pcb-rpp"), rpp_schedule=schedule)
        assert line in announced(config, tmp_path, capsys)
    config = with_recipe(preset("tiny", "pcb-rpp"), epochs=3)
    assert "phases: stripes in epoch 1, parts in epochs 2 to 3\n" in announced(config, tmp_path, capsys)
    assert "phases:" not in announced(preset("tiny", "pcb"), tmp_path, capsys)


def test_the_share_of_the_least_part_is_recorded_as_soon_as_there_are_parts(whole):
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [LEAST_PART in record for record in records] == [False, True, True]
    for record in records:
        losses = [value for name, value in record.items() if name.startswith("cross_entropy")]
        assert record["loss"] == pytest.approx(sum(losses), rel=1e-5)  # a figure is no loss
        assert 0 < record.get(LEAST_PART, 0.1) < 0.25


@pytest.fixture
def warn(tmp_path):
    """Call it with the epoch of a run of 60, and with more of its record."""
    base = preset("tiny", "pcb-rpp")
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, num_classes=10))
    announcer = Announcer(base, ReidDataset(train=(), query=(), gallery=()), tmp_path, "off")
    record = {"cross_entropy1": 1.0, "data_seconds": 0.0, "seconds": 1.0}
    return lambda epoch, **more: announcer.warn({**record, "epoch": epoch, **more}, {}, 1)


@pytest.mark.parametrize(("share", "warned"), [(0.019, True), (0.021, False), (0.25, False)])
def test_a_part_without_cells_is_warned_of(warn, caplog, share, warned):
    warn(40, **{LEAST_PART: share})
    assert ("1.9%" in caplog.text) == warned
    assert len(caplog.records) == warned


@pytest.mark.parametrize(("epoch", "warned"), [(6, False), (13, False), (14, True), (25, True)])
def test_phases_that_share_one_schedule_share_its_rise(warn, caplog, epoch, warned):
    """It takes 22 % of 60 epochs, and not of the 24 with stripes."""
    warn(epoch, cross_entropy1=2.3)
    assert ("collapsed" in caplog.text) == warned


def test_the_part_classifier_alone_is_trained_in_its_phase(config, whole, tmp_path, monkeypatch):
    """Every other weight has the same bits after as before; batch statistics follow the new parts."""
    begun = []
    original = trainer.Trainer._begin

    def begins(self, phase):
        begun.append({name: value.clone() for name, value in self.model.state_dict().items()})
        original(self, phase)

    monkeypatch.setattr(trainer.Trainer, "_begin", begins)
    train(config, tmp_path / "run", ON_CPU)
    before, after = begun
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in moved if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert moved - statistics == {"part_classifier.conv.weight", "part_classifier.conv.bias"}
    assert "reductions.0.bn.running_mean" in statistics
    assert same(load(tmp_path / "run" / "last.pth")["model"], load(whole / "last.pth")["model"])


class Killed(BaseException):
    """As by kill -9: nothing is saved."""


def written(saver):
    """Whether last.pth is, for which it waits."""
    return saver._last is None or saver._last.exception() is None


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step in (4, 5) else pytest.mark.slow) for step in range(1, 10)]
)
def test_a_run_that_saves_before_each_step_and_is_killed_at_any_ends_with_the_same_bits(
    whole, config, tmp_path, monkeypatch, step
):
    """Of nine, three in each phase. What was averaged is the same too."""
    original, steps, out = trainer.train_step, [], tmp_path / "run"

    def kills(*args, **kwargs):
        steps.append(1)
        if len(steps) == step:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", kills)
        patch.setattr(Saver, "due", property(written))
        with pytest.raises(Killed):
            train(config, out, ON_CPU)
    saved = load(out / "last.pth")
    assert 3 * saved["epoch"] + saved["progress"]["steps"] == step - 1
    train(saved_config(out), out, RESUMED)
    for name in ("last.pth", "best.pth"):
        found, expected = (load(folder / name) for folder in (out, whole))
        assert same(found["model"], expected["model"])
        assert (found["ema"] is None) == (name == "best.pth")  # whose model is the average
    assert same(load(out / "last.pth")["ema"]["model"], load(whole / "last.pth")["ema"]["model"])


def test_a_run_in_phases_is_not_extended(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run", copy_function=shutil.copyfile)
    before = (out / "last.pth").read_bytes()
    done = run_here("-m", "pmm.train", "--out", out, "--resume", "--extend", "--epochs", "9", "--device", "cpu")
    assert_one_line_error(done, "--method pcb-rpp cannot be extended", "start another run")
    again = run_here("-m", "pmm.train", "--out", out, "--resume", "--device", "cpu")
    assert "the run is finished (3 epochs)" in again.stdout, again.stderr
    assert (out / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (("--parts", "3"), ("--parts", "3", "1, 2, 4 or 8")),
        (("--parts", "0"), ("--parts", "0")),
        (("--reduction", "own"), ("--reduction", "own", "shared", "independent")),
        (("--embedding", "G"), ("--embedding", "G", "g", "h")),
        (("--dropout", "1"), ("--dropout", "1")),
        (("--backbone", "timm:resnet18", "--last-stride", "2"), ("--last-stride", "timm:resnet18")),
        (("--rpp-schedule", "papers"), ("--rpp-schedule", "papers", "authors", "induced")),
        (("--epochs", "1"), ("--epochs", "1", "at least 2")),
        (("--epochs", "2", "--rpp-schedule", "induced"), ("--epochs", "2", "at least 3")),
        (("--method", "pcb", "--rpp-schedule", "induced"), ("--rpp-schedule", "pcb-rpp")),
        (("--method", "pmm", "--parts", "4"), ("--parts", "pcb or pcb-rpp")),
    ],
)
def test_what_cannot_be_trained_costs_a_line(people, tmp_path, flags, facts):
    place = "--preset", "tiny", "--root", people, "--out", tmp_path / "run", "--device", "cpu"
    done = run_here("-m", "pmm.train", "--method", "pcb-rpp", *place, *flags)
    assert_one_line_error(done, *facts)
    assert not (tmp_path / "run").exists()


def _stepped(config, processes):
    """Losses, gradients and weights of two steps in each phase, with the batch statistics as they are."""
    found = []
    loader, sampler = train_batches(
        read_dataset("synthetic", config.data.root).train, config, rank=processes.rank, world=processes.world
    )
    sampler.epochs = range(1, 2)
    batch = next(iter(loader))
    for phase in phases_of(config):
        torch.manual_seed(0)
        state = make_train_state(build_model(config), config, CPU, 10, processes, phase)
        nn.init.normal_(state.model.part_classifier.conv.weight)
        state = in_train_mode(state, 1)
        state.model.eval()
        for _ in range(2):
            losses = train_step(state, batch)
        weights = dict(state.model.named_parameters())
        gradients = {name: weight.grad.clone() for name, weight in weights.items() if weight.requires_grad}
        values = {name: weight.detach().clone() for name, weight in weights.items()}
        found.append({"losses": losses, "gradients": gradients, "weights": values})
    return found


def started(rank, ports, config, out):
    """One of two processes, which, as on GPUs, refuse a weight that has no part in a step."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    torch.set_num_threads(1)
    original = nn.parallel.DistributedDataParallel

    def strict(*args, find_unused_parameters, **kwargs):
        return original(*args, find_unused_parameters=False, **kwargs)

    nn.parallel.DistributedDataParallel = strict
    with init_distributed(CPU) as (processes, _):
        torch.save(_stepped(config, processes), out / f"{rank}.pt")
    os.environ["MASTER_PORT"] = ports[1]
    train(dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0)), out / "run", ON_CPU)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_in_each_phase(config, tmp_path):
    model = dataclasses.replace(config.model, num_classes=12, dropout=0.0)  # dropout is drawn by each
    config = with_recipe(dataclasses.replace(config, model=model), batch_size=16)
    given = (free_port(), free_port()), config, tmp_path
    torch.multiprocessing.start_processes(started, given, nprocs=2, start_method="forkserver")
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for alone, first, second in zip(_stepped(config, SINGLE), *both, strict=True):
        assert same(first["weights"], second["weights"])
        assert first["gradients"].keys() == alone["gradients"].keys()
        for name, value in alone["gradients"].items():
            torch.testing.assert_close(first["gradients"][name], value, rtol=1e-3, atol=1e-6)
        for name, loss in alone["losses"].items():
            if name != LEAST_PART:  # the least of each half is not that of all
                torch.testing.assert_close((first["losses"][name] + second["losses"][name]) / 2, loss)
    assert load(tmp_path / "run" / "best.pth")["epoch"] == 3


@pytest.mark.slow
def test_after_a_short_run_parts_are_where_their_stripes_were(small_config, tmp_path):
    """The centres of mass of their shares follow each other from top to bottom."""
    config = with_recipe(with_method(small_config, "pcb-rpp"), epochs=40)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, val_identities=0.0))
    model = load_model(train(config, tmp_path / "run", ON_CPU))
    crops = next(iter(train_batches(read_dataset("synthetic", config.data.root).train, config)[0]))
    with torch.no_grad():
        shares = model.part_shares(normalize_batch(crops, preprocessing_of(config), CPU))
    mass = shares.sum((0, 3))
    centres = (mass * torch.arange(8)).sum(1) / mass.sum(1)
    assert (centres.diff() > 0.5).all(), centres
