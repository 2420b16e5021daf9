"""A training in phases: what each changes, and that an interrupted one ends with the same bits."""

import copy
import dataclasses
import signal

import pytest
import torch

from pmm.artifacts.checkpoint import load, restore_model
from pmm.artifacts.trained_model import load_model
from pmm.models.registry import build_model, phases_of
from pmm.presets import with_method
from pmm.training import trainer as module
from pmm.training.flags import TrainOptions, saved_config
from pmm.training.launch import train
from pmm.training.snapshot import restore_training, snapshot
from pmm.training.state import in_train_mode, make_train_state, next_phase
from pmm.training.step import train_step
from pmm.training.trainer import Trainer
from pmm.utils.errors import InvalidFile, TrainingInterrupted
from tests.refusals import refuses

CPU = torch.device("cpu")
ON_CPU = TrainOptions(device="cpu")


def config_of(small_config, schedule="authors", **recipe):
    config = with_method(small_config, "pcb-rpp")
    data = dataclasses.replace(config.data, workers=0)
    recipe = dataclasses.replace(config.recipe, epochs=3, rpp_schedule=schedule, optimizer="sgd", lr=0.01, **recipe)
    model = dataclasses.replace(config.model, dropout=0.5)  # whose draws go on too
    return dataclasses.replace(config, data=data, model=model, recipe=recipe)


@pytest.fixture(scope="module")
def whole(small_config, tmp_path_factory):
    """An uninterrupted run of each schedule, made when it is first asked for: its folder and its configuration."""
    made = {}

    def of(schedule):
        if schedule not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            train(config_of(small_config, schedule), out, ON_CPU)
            made[schedule] = out
        return made[schedule]

    return of


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stop_in(monkeypatch, epoch, step):
    original = module.train_step

    def stops(state, batch, **place):
        if (place["epoch"], place["step"]) == (epoch, step):
            signal.raise_signal(signal.SIGTERM)
        return original(state, batch, **place)

    monkeypatch.setattr(module, "train_step", stops)


def stop_between(monkeypatch, phase):
    """As the phase of that number begins, before its first step."""
    original = Trainer._begin

    def stops(self, begun):
        original(self, begun)
        if self.phases.index(begun) == phase:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_begin", stops)


@pytest.mark.parametrize(
    ("schedule", "stop"),
    [
        ("authors", lambda patch: stop_in(patch, 1, 0)),
        ("authors", lambda patch: stop_between(patch, 1)),
        ("authors", lambda patch: stop_in(patch, 2, 1)),
        ("authors", lambda patch: stop_in(patch, 3, 0)),
        pytest.param("induced", lambda patch: stop_between(patch, 1), marks=pytest.mark.slow),
        pytest.param("induced", lambda patch: stop_in(patch, 2, 0), marks=pytest.mark.slow),
        pytest.param("induced", lambda patch: stop_between(patch, 2), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_in_or_between_phases_ends_with_the_same_bits(
    schedule, stop, whole, small_config, tmp_path, monkeypatch
):
    out, config = tmp_path / "run", config_of(small_config, schedule)
    with monkeypatch.context() as patch:
        stop(patch)
        with pytest.raises(TrainingInterrupted):
            train(config, out, ON_CPU)
    stopped = load(out / "last.pth")
    assert (out / "best.pth").exists() == (stopped["epoch"] in phases_of(config)[-1].epochs)
    train(saved_config(out), out, dataclasses.replace(ON_CPU, resume=True))
    for name in ("last.pth", "best.pth"):
        found, expected = (load(folder / name) for folder in (out, whole(schedule)))
        assert same(found["model"], expected["model"])
        assert found["epoch"] == expected["epoch"] == 3


def test_a_process_that_is_killed_between_phases_loses_nothing(whole, small_config, tmp_path, monkeypatch):
    """last.pth is of the middle of the first phase, or of its first save."""

    class Killed(BaseException):
        pass

    def killed(self, phase):
        raise Killed

    out, config = tmp_path / "run", config_of(small_config)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_begin", killed)
        with pytest.raises(Killed):
            train(config, out, ON_CPU)
    train(saved_config(out), out, dataclasses.replace(ON_CPU, resume=True))
    assert same(load(out / "last.pth")["model"], load(whole("authors") / "last.pth")["model"])


@pytest.fixture
def state(small_config):
    config = config_of(small_config, "induced")
    model = dataclasses.replace(config.model, num_classes=12)
    config = dataclasses.replace(config, model=model)
    torch.manual_seed(0)
    return in_train_mode(make_train_state(build_model(config), config, CPU, 2), 1)


@pytest.fixture(scope="module")
def batch(small_config, people):
    from pmm.data.loader import train_batches
    from pmm.data.readers import read_dataset

    config = config_of(small_config)
    return next(iter(train_batches(read_dataset("synthetic", people).train, config)[0]))


def weights(state):
    return {name: value.clone() for name, value in state.model.named_parameters()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_phase_trains_what_it_should_and_begins_without_momentum(state, batch):
    _, classifier, parts = phases_of(state.config)
    before = weights(state)
    train_step(state, batch)
    first = moved(before, weights(state))
    assert first == {name for name in before if not name.startswith("part_classifier.")}
    assert all(entry["momentum_buffer"] is not None for entry in state.optimizer.state.values())
    state = in_train_mode(next_phase(state, classifier), 2)
    assert not state.optimizer.state
    assert all(module.training for module in state.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    before = weights(state)
    train_step(state, batch)
    assert moved(before, weights(state)) == {"part_classifier.conv.weight", "part_classifier.conv.bias"}
    state = in_train_mode(next_phase(state, parts), 3)
    before = weights(state)
    train_step(state, batch)
    assert moved(before, weights(state)) == set(before)


def test_in_the_first_step_the_heads_move_ten_times_as_far_for_their_gradient(small_config, batch):
    config = with_method(small_config, "pcb")
    recipe = dataclasses.replace(
        config.recipe,
        optimizer="nesterov",
        lr=0.1,
        backbone_lr=0.1,
        weight_decay=0.0,
        schedule="milestones",
        warmup=0.0,
    )
    config = dataclasses.replace(config, recipe=recipe, model=dataclasses.replace(config.model, num_classes=12))
    torch.manual_seed(0)
    state = in_train_mode(make_train_state(build_model(config), config, CPU, 2), 1)
    before = weights(state)
    train_step(state, batch)
    for name, weight in state.model.named_parameters():
        rate = 0.01 if name.startswith("backbone.") else 0.1
        # Nesterov's first step is 1 + momentum times the gradient
        torch.testing.assert_close(before[name] - weight, rate * 1.9 * weight.grad, rtol=1e-4, atol=1e-7)


def test_a_model_of_the_first_phase_is_evaluated_with_stripes(state, tmp_path):
    saved = snapshot(state, 1, -1.0)
    model, _ = restore_model(saved, tmp_path)
    assert not model.refined
    assert restore_model({**saved, "epoch": 3}, tmp_path)[0].refined
    assert restore_model({**saved, "progress": {"steps": 1}}, tmp_path)[0].refined


def test_the_deployed_model_is_of_the_last_phase(whole):
    assert load_model(whole("authors") / "best.pth").refined


def test_averages_begin_anew_with_each_phase(small_config, batch):
    config = config_of(small_config, ema=0.9)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=12))
    torch.manual_seed(0)
    state = in_train_mode(make_train_state(build_model(config), config, CPU, 2), 1)
    train_step(state, batch)
    state = in_train_mode(next_phase(state, phases_of(config)[1]), 2)
    assert state.ema.steps == 0
    assert same(state.ema.module.state_dict(), state.model.state_dict())
    assert state.ema.module.refined


def test_a_snapshot_of_a_later_phase_is_restored_in_it(state, batch, tmp_path):
    _, classifier, _ = phases_of(state.config)
    state = in_train_mode(next_phase(state, classifier), 2)
    train_step(state, batch)
    saved = copy.deepcopy(snapshot(state, 1, -1.0, {"steps": 1}))
    torch.manual_seed(1)
    other = make_train_state(build_model(state.config), state.config, CPU, 2, phase=classifier)
    restore_training(saved, other, tmp_path)
    for each in (state, other):
        train_step(in_train_mode(each, 2), batch, epoch=2, step=1)
    assert same(state.model.state_dict(), other.model.state_dict())


def test_a_checkpoint_of_another_method_is_no_beginning(whole, trained, small_config, tmp_path):
    def begin(init):
        config = config_of(small_config)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=str(init)))
        train(config, tmp_path / "run", ON_CPU)

    with refuses(InvalidFile, "pmm", "pcb or pcb-rpp", path=trained):
        begin(trained)
    assert not (tmp_path / "run").exists()
    begin(whole("authors") / "best.pth")
    assert (tmp_path / "run" / "best.pth").exists()
