"""Phases: shares of the epochs, and what each trains."""

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.models.phases import phase_of
from pmm.models.registry import METHODS, check_method_flags, phases_of
from pmm.presets import PRESETS, preset
from pmm.training.state import learning_rate
from pmm.utils.errors import ConflictingOptions, InvalidValue
from tests.refusals import refuses

SEVERAL = [("pcb-rpp", "authors", 2), ("pcb-rpp", "induced", 3), ("aos", "authors", 2)]
SEVERAL = [case for case in SEVERAL if case[0] in METHODS]


def config_of(method, epochs, name="tiny", schedule="authors"):
    base = preset(name, method)
    recipe = dataclasses.replace(base.recipe, epochs=epochs, rpp_schedule=schedule)
    return dataclasses.replace(base, recipe=recipe)


@pytest.mark.parametrize(("method", "schedule", "count"), SEVERAL)
@given(epochs=st.integers(3, 500), name=st.sampled_from(sorted(PRESETS)))
def test_they_follow_each_other_and_are_all_epochs(method, schedule, count, epochs, name):
    phases = phases_of(config_of(method, epochs, name, schedule))
    assert len(phases) == count
    assert [epoch for phase in phases for epoch in phase.epochs] == list(range(1, epochs + 1))
    assert all(phase.recipe.epochs == len(phase.epochs) >= 1 for phase in phases)
    for epoch in range(1, epochs + 1):
        assert epoch in phase_of(phases, epoch).epochs
    assert phase_of(phases, epochs + 7) == phases[-1]
    assert phase_of(phases, 0) == phases[0]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in {case[0] for case in SEVERAL}])
def test_other_methods_have_one(method):
    config = config_of(method, 7)
    (phase,) = phases_of(config)
    assert (phase.recipe, phase.begin, phase.anew) == (config.recipe, 0, False)
    assert phase.trains("backbone.layer4.0.conv1.weight")


@pytest.mark.parametrize(("method", "schedule", "count"), SEVERAL)
def test_fewer_epochs_than_phases_are_refused(method, schedule, count):
    config = config_of(method, count - 1, schedule=schedule)
    for ask in (phases_of, lambda config: check_method_flags(config, set())):
        with refuses(InvalidValue, f"at least {count}", name="--epochs", value=count - 1):
            ask(config)


def rates(phase, place):
    """The backbone's (0) or the heads' (1) rate in each epoch of a phase."""
    factor = phase.recipe.backbone_lr if place == 0 else 1.0
    return [factor * learning_rate(phase.recipe, epoch, 1) for epoch in range(phase.recipe.epochs)]


def test_the_authors_schedule_of_rpp():
    """20 epochs with stripes at 0.1 and 0.01; 30 of everything, at 0.01 for 20 and 0.001 for 10."""
    stripes, parts = phases_of(config_of("pcb-rpp", 50, "paper"))
    assert rates(stripes, 0) == pytest.approx([0.01] * 20)
    assert rates(stripes, 1) == pytest.approx([0.1] * 20)
    for place in (0, 1):
        assert rates(parts, place) == pytest.approx([0.01] * 20 + [0.001] * 10)
    assert not stripes.trains("part_classifier.conv.weight")
    assert parts.trains("part_classifier.conv.weight")
    assert parts.trains("backbone.layer4.0.conv1.weight")


def test_the_induced_schedule_of_rpp():
    """60 epochs of PCB, 5 of the part classifier alone, 10 of everything."""
    stripes, classifier, parts = phases_of(config_of("pcb-rpp", 75, "paper", "induced"))
    assert rates(stripes, 1) == pytest.approx([0.1] * 40 + [0.01] * 20)
    assert rates(classifier, 1) == pytest.approx([0.01] * 5)
    assert rates(parts, 1) == pytest.approx([0.01] * 10)
    assert rates(parts, 0) == pytest.approx([0.001] * 10)
    assert [phase.trains("classifiers.0.weight") for phase in (stripes, classifier, parts)] == [True, False, True]
    assert [phase.trains("part_classifier.conv.bias") for phase in (stripes, classifier, parts)] == [False, True, True]


FALLS = {"pcb": {41: 0.1}, "aos": {26: 0.1, 51: 0.01}, "cama": {41: 0.1, 61: 0.01}}


@pytest.mark.parametrize("method", [name for name in FALLS if name in METHODS])
def test_the_papers_rates_fall_where_they_say(method):
    phase = phases_of(preset("paper", method))[0]
    highest, after = phase.recipe.lr, FALLS[method]
    found = rates(phase, 1)
    steps = {epoch: now for epoch, (before, now) in enumerate(pairwise(found), start=2) if now < 0.5 * before}
    assert steps == pytest.approx({epoch: highest * factor for epoch, factor in after.items()})


def test_a_warm_up_comes_before_the_milestones():
    recipe = preset("paper", "cama").recipe
    found = [learning_rate(recipe, step, 10) for step in range(700)]
    assert found[0] == pytest.approx(recipe.lr / 100)
    assert found[99] == found[399] == pytest.approx(recipe.lr)
    assert all(before < after for before, after in pairwise(found[:100]))


@pytest.mark.parametrize("milestones", [(0.5, 0.5), (0.6, 0.4), (0.0,), (1.0,), (-0.1,)])
def test_milestones_must_rise(milestones):
    with refuses(InvalidValue, "larger than the one before", name="milestones", value=milestones):
        dataclasses.replace(preset("paper", "pcb").recipe, milestones=milestones)


def test_a_triplet_loss_needs_several_images_of_an_identity():
    config = preset("tiny")
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, sampler="shuffle"))
    with refuses(ConflictingOptions, "pmm", options=("--sampler", "--method")):
        check_method_flags(config, set())
    shuffled = preset("paper", "pcb")
    assert shuffled.recipe.sampler == "shuffle"
    check_method_flags(shuffled, set())
