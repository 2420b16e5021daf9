"""AOS's two trainings and what is between them, whole, interrupted anywhere, and by two processes."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from pmm.artifacts.checkpoint import load, restore_model
from pmm.data.occlusion import TABLE, read_table
from pmm.presets import with_method
from pmm.runtime.torch_runner import set_threads
from pmm.training import occlusion_table, trainer
from pmm.training.data_setup import training_data
from pmm.training.distributed import SINGLE
from pmm.training.flags import TrainOptions, saved_config
from pmm.training.launch import train
from pmm.training.occlusion_table import FIRST, SHARDS
from pmm.utils.errors import CannotWrite, InvalidFile, TrainingInterrupted
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses
from tests.training.test_distributed import free_port

ON_CPU, RESUMED = TrainOptions(device="cpu"), TrainOptions(device="cpu", resume=True)


class Killed(BaseException):
    """As by kill -9: nothing is saved."""


@pytest.fixture(scope="module")
def config(small_config):
    """Two trainings of two epochs, on small crops."""
    config = with_method(small_config, "aos")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, height=64, width=32),
        recipe=dataclasses.replace(config.recipe, epochs=4),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted run's folder."""
    out = tmp_path_factory.mktemp("aos") / "run"
    train(config, out, ON_CPU)
    return out


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def on_step(patch, number, action):
    """Calls `action` before the step of that number, from 1; returns what each step's batch hides."""
    original, hidden = trainer.train_step, []

    def step(state, batch, **place):
        hidden.append(batch.cutouts.any(1))
        if len(hidden) == number:
            action()
        return original(state, batch, **place)

    patch.setattr(trainer, "train_step", step)
    return hidden


def kill():
    raise Killed


def terminate():
    signal.raise_signal(signal.SIGTERM)


def test_what_it_leaves(whole, config):
    assert {path.name for path in whole.iterdir()} == {
        "best.pth", "last.pth", FIRST, TABLE, "config.json", "metrics.jsonl", "tensorboard", ".lock"
    }  # fmt: skip
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    first, second = records[:2], records[2:]
    assert [record["lr"] for record in first] == [record["lr"] for record in second]
    assert first[0]["loss"] != second[0]["loss"]
    content = load(whole / FIRST)
    assert (content["epoch"], content["optimizer"]) == (2, None)
    assert restore_model(content, whole)[1].model.method == "aos"
    assert read_table(whole / TABLE).facts.checkpoint == occlusion_table.sha256(whole / FIRST)


@pytest.mark.parametrize("pick", ["sampling", "random"])
def test_without_occlusions_the_second_training_equals_the_first_bit_for_bit(config, tmp_path, pick, monkeypatch):
    hidden = on_step(monkeypatch, 0, kill)
    recipe = dataclasses.replace(config.recipe, aos_share=0.0, aos_pick=pick)
    train(dataclasses.replace(config, recipe=recipe), tmp_path / "run", ON_CPU)
    first, last = load(tmp_path / "run" / FIRST), load(tmp_path / "run" / "last.pth")
    assert same(first["model"], last["model"])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "lr", "val_mAP", "val_rank1")
    assert [[r[key] for key in keys] for r in records[:2]] == [[r[key] for key in keys] for r in records[2:]]
    assert not torch.cat(hidden).any()


def test_half_of_the_crops_of_the_second_training_are_occluded(config, tmp_path, monkeypatch):
    hidden = on_step(monkeypatch, 0, kill)
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, epochs=16))
    train(config, tmp_path / "run", ON_CPU)
    first, second = (torch.cat(half).double() for half in (hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]))
    assert not first.any()
    assert abs(second.mean() - 0.5) < 3 * 0.5 / len(second) ** 0.5


@pytest.mark.parametrize(
    ("step", "action"),
    [
        (8, terminate),
        *(pytest.param(step, kill, marks=pytest.mark.slow) for step in (1, 4, 6, 7, 9, 12)),
        *(pytest.param(step, terminate, marks=pytest.mark.slow) for step in (2, 6, 7, 11)),
    ],
)
def test_a_run_that_is_interrupted_anywhere_ends_with_the_same_bits(whole, config, tmp_path, monkeypatch, step, action):
    """And goes on with other workers. Of twelve steps, six are of the first training."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_step(patch, step, action)
        with pytest.raises((Killed, TrainingInterrupted)):
            train(config, out, ON_CPU)
    assert not (out / "best.pth").exists() or step > 6
    saved = saved_config(out)
    train(dataclasses.replace(saved, data=dataclasses.replace(saved.data, workers=1)), out, RESUMED)
    for name in ("last.pth", "best.pth", FIRST):
        assert same(load(out / name)["model"], load(whole / name)["model"]), name
    found, expected = (read_table(folder / TABLE) for folder in (out, whole))
    assert (found.whole == expected.whole).all()
    assert (found.behind == expected.behind).all()


def test_a_save_before_the_first_step_of_the_second_training_is_none_of_the_first_model(
    whole, config, tmp_path, monkeypatch
):
    out, begin = tmp_path / "run", trainer.Trainer._begin
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_begin", lambda self, phase: begin(self, phase) or terminate())
        with pytest.raises(TrainingInterrupted):
            train(config, out, ON_CPU)
    saved = load(out / "last.pth")
    assert (saved["epoch"], saved["progress"]["steps"]) == (2, 0)
    assert not same(saved["model"], load(out / FIRST)["model"])
    train(saved_config(out), out, RESUMED)
    for name in ("last.pth", "best.pth", FIRST):
        assert same(load(out / name)["model"], load(whole / name)["model"]), name


@pytest.mark.parametrize("how", [kill, terminate])
def test_between_the_trainings_nothing_is_lost(whole, config, tmp_path, monkeypatch, how):
    """Neither a step of the first nor a shard of the table is made twice."""
    out, original = tmp_path / "run", occlusion_table.write_table

    def interrupted(path, table):
        original(path, table)
        if len(list((out / SHARDS).glob("[!.]*.npz"))) == 2:
            how()

    monkeypatch.setattr(occlusion_table, "SHARD", 32)
    with monkeypatch.context() as patch:
        patch.setattr(occlusion_table, "write_table", interrupted)
        with pytest.raises(Killed if how is kill else TrainingInterrupted):
            train(config, out, ON_CPU)
    assert load(out / "last.pth")["epoch"] == 2
    assert len(list((out / SHARDS).iterdir())) == 2
    hidden = on_step(monkeypatch, 0, kill)
    train(saved_config(out), out, RESUMED)
    assert len(hidden) == 6
    for name in ("last.pth", "best.pth", FIRST):
        assert same(load(out / name)["model"], load(whole / name)["model"]), name
    assert (out / TABLE).read_bytes() == (whole / TABLE).read_bytes()


def test_a_table_of_something_else_costs_a_line_and_no_step(whole, config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_step(patch, 9, terminate)
        with pytest.raises(TrainingInterrupted):
            train(config, out, ON_CPU)
    before, last = (out / TABLE).read_bytes(), (out / "last.pth").read_bytes()
    (out / TABLE).write_bytes(before[: len(before) // 2])
    done = run_here("-m", "pmm.train", "--out", out, "--resume", "--device", "cpu")
    assert_one_line_error(done, f"{out / TABLE}: truncated", "--resume")
    other = read_table(whole / TABLE)
    other = dataclasses.replace(other, facts=dataclasses.replace(other.facts, checkpoint="12ab"))
    occlusion_table.write_table(out / TABLE, other)
    with refuses(InvalidFile, "12ab", path=out / TABLE):
        train(saved_config(out), out, RESUMED)
    assert (out / "last.pth").read_bytes() == last
    assert {path.name for path in out.glob(".*")} == {".lock"}
    (out / TABLE).unlink()  # as the line says
    train(saved_config(out), out, RESUMED)
    assert (out / TABLE).read_bytes() == before
    assert same(load(out / "last.pth")["model"], load(whole / "last.pth")["model"])


def test_a_full_disk_between_the_trainings_is_one_line(config, tmp_path, monkeypatch):
    def full(path, table):
        raise CannotWrite("No space left on device", path=path)

    with monkeypatch.context() as patch:
        patch.setattr(occlusion_table, "write_table", full)
        with refuses(CannotWrite, "No space left on device", hint="--resume"):
            train(config, tmp_path / "run", ON_CPU)
    train(saved_config(tmp_path / "run"), tmp_path / "run", RESUMED)


def started(rank, port, config, out):
    """One of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    occlusion_table.SHARD = 16
    tried, original = [], occlusion_table.OccludedModel.certainty

    def counted(self, crops, labels):
        tried.append(len(crops))
        return original(self, crops, labels)

    occlusion_table.OccludedModel.certainty = counted
    hidden = on_step(pytest.MonkeyPatch(), 0, kill)
    train(config, out, TrainOptions(device="cpu", threads=1))
    torch.save({"tried": sum(tried), "hidden": hidden}, out.parent / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_share_the_table_and_draw_as_one(config, tmp_path, monkeypatch):
    """The table is of the model that two processes trained: one process asks that model for the same bits."""
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=16))
    out = tmp_path / "run"
    torch.multiprocessing.start_processes(started, (free_port(), config, out), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    images = read_table(out / TABLE).facts.images
    assert first["tried"] + second["tried"] == len(images)
    assert abs(first["tried"] - second["tried"]) <= 16
    both = [torch.cat(pair) for pair in zip(first["hidden"], second["hidden"], strict=True)]
    table, one_thread = (out / TABLE).read_bytes(), TrainOptions(device="cpu", threads=1)
    hidden = on_step(monkeypatch, 0, kill)
    train(saved_config(out), tmp_path / "alone", one_thread)
    assert all(map(torch.equal, both, hidden))
    (out / TABLE).unlink()
    config, split = training_data(saved_config(out))
    undo = set_threads(1)
    occlusion_table.make_occluder(out, split.train, config, torch.device("cpu"), SINGLE)
    undo()
    assert (out / TABLE).read_bytes() == table
