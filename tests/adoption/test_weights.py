"""Weights of a file: every key of it and of the network is accounted for, whatever wraps them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pmm.adoption.weights import load_weights
from pmm.utils.errors import InvalidFile, InvalidValue
from tests.adoption.networks import Plain
from tests.conftest import examples
from tests.refusals import refuses

NEEDED = {f"conv.{part}" for part in ("weight", "bias")} | {
    f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")
}


def state(seed=1, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in Plain(classes=classes).state_dict().items()
    }


def load(tmp_path, content, ignore=(), module=None):
    torch.save(content, tmp_path / "w.pth")
    module = module or Plain()
    loaded = load_weights(module, tmp_path / "w.pth", ignore)
    return module, loaded


def read(module):
    return {name for name in module.state_dict() if name.removeprefix("net.") in NEEDED}


def account(tmp_path, content, ignore=(), module=None):
    module, loaded = load(tmp_path, content, ignore, module)
    return module, loaded.account(module.state_dict(), read(module))


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "state_dict.", "state_dict.module.net.", "model_ema.module."]
)
def test_weights_are_found_below_any_wrapping(prefix, tmp_path):
    flat = {f"{prefix}{name}": value for name, value in state().items()}
    module, table = account(tmp_path, {"epoch": 3, **flat, "optimizer": {"state": {0: torch.zeros(2)}}})
    assert torch.equal(module.conv.weight, state()["conv.weight"])
    lines = table.splitlines()
    assert any(line.split()[1:3] == ["taken", "6"] for line in lines)
    assert any("classifier" in line or "not needed" in line for line in lines)
    counted = sum(int(line.split(" out ")[-1].split()[0]) for line in lines if "left out" in line)
    assert counted == 2


def test_of_two_copies_the_averaged_ones_are_taken(tmp_path):
    module, table = account(tmp_path, {"model": state(1), "ema": state(2)})
    assert torch.equal(module.conv.weight, state(2)["conv.weight"])
    assert "another copy" in table


@pytest.mark.parametrize("first", ["online", "target"])
def test_of_two_copies_that_differ_the_user_chooses(first, tmp_path):
    second = {"online": "target", "target": "online"}[first]
    content = {first: state(1), second: state(2)}
    with refuses(InvalidFile, first, second, path=tmp_path / "w.pth", hint=f"--ignore '{second}.*'"):
        load(tmp_path, content)
    for left_out, seed in ((second, 1), (first, 2)):
        module, table = account(tmp_path, content, [f"{left_out}.*"])
        assert torch.equal(module.conv.weight, state(seed)["conv.weight"])
        assert f"--ignore: {left_out}." in table
    assert "another copy" in account(tmp_path, {first: state(1), second: state(1)})[1]
    inner = nn.Sequential(Plain())
    nested = {key: {f"0.{name}": value for name, value in each.items()} for key, each in content.items()}
    with refuses(InvalidFile, f"below {first}, {second}, and", hint=f"--ignore '{second}.*'"):
        load(tmp_path, nested, module=inner)
    averaged = {first: state(1), "ema": state(2)}
    module, _ = account(tmp_path, averaged, ["ema.*"])
    assert torch.equal(module.conv.weight, state(1)["conv.weight"])


STATES = (
    "optimizer.state.0.exp_avg", "optim.state.0.exp_avg", "amp_scaler.scale", "rng_state", "lr_sched.last",
    "scheduler_state_dict.last", "optimizer_states.0", "optimizer_center.state.0.step", "progress.loss",
)  # fmt: skip
LAYERS = ("optimal.weight", "scheduled_gate.weight", "rng_proj.weight", "logit_scaler.weight", "scaler.weight",
          "progressive_3.conv", "optimizer_gate.bias")  # fmt: skip


def test_only_the_state_of_a_training_is_left_out_as_that(tmp_path):
    extra = dict.fromkeys((*STATES, *LAYERS), torch.zeros(2))
    _, loaded = load(tmp_path, state() | extra)
    assert loaded.unknown == list(LAYERS)
    assert loaded.unused["left out", "the state of its training"] == list(STATES)


def test_a_network_within_the_users_own_takes_the_weights_of_the_inner_one(tmp_path):
    outer = nn.Module()
    outer.net = Plain()
    module, table = account(tmp_path, state(), module=outer)
    assert torch.equal(module.net.conv.weight, state()["conv.weight"])
    assert "needed by the embeddings" in table


def test_a_classifier_of_other_people_or_one_more_does_not_matter(tmp_path):
    _, table = account(tmp_path, state(classes=9) | {"head.fc.weight": torch.zeros(9, 8)})
    assert "classifier.weight [9, 8] instead of [5, 8]" in table
    assert "1  a classifier, which the network does not have: head.fc.weight" in table
    without = {name: value for name, value in state().items() if "classifier" not in name}
    assert "as the factory made them" in account(tmp_path, without)[1]


def test_weights_that_share_memory_may_be_in_the_file_once(tmp_path):
    module = Plain()
    module.again = module.conv
    _, table = account(tmp_path, state(), module=module)
    assert "lacks" not in table


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"conv.weight": None}, ("lacks 1 of the 6", "conv.weight")),
        ({"conv.weight": torch.zeros(8, 3, 5, 5)}, ("conv.weight [8, 3, 5, 5] instead of [8, 3, 3, 3]",)),
        ({"neck.weight": torch.zeros(3)}, ("1 weights", "neck.weight", "--ignore neck.weight")),
        ({"conv.weight": torch.full((8, 3, 3, 3), float("nan"))}, ("conv.weight", "NaN")),
    ],
)
def test_weights_that_do_not_fit_are_named(change, facts, tmp_path):
    content = {name: value for name, value in (state() | change).items() if value is not None}
    with refuses(InvalidFile, *facts, path=tmp_path / "w.pth"):
        account(tmp_path, content)


def test_surplus_weights_can_be_ignored_by_a_pattern_that_matches_some(tmp_path):
    content = {"model": state() | {"neck.weight": torch.zeros(3), "neck.bias": torch.zeros(3)}}
    assert "2  --ignore: model.neck.weight, model.neck.bias" in account(tmp_path, content, ["neck.*"])[1]
    with refuses(InvalidValue, "w.pth", name="--ignore", value="nack.*"):
        account(tmp_path, content, ["nack.*"])


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1], {"a": torch.zeros(3)}, torch.zeros(3)])
def test_a_file_without_weights_of_the_network_is_refused(content, tmp_path):
    with refuses(InvalidFile, "no weights of this network", path=tmp_path / "w.pth"):
        load(tmp_path, content)


@examples(40)
@given(st.data())
def test_each_key_of_the_file_is_accounted_for_once(tmp_path_factory, data):
    extra = st.dictionaries(
        st.sampled_from(
            ["epoch", "optimizer.state", "fc.weight", "neck.bias", "norm.num_batches_tracked", "ema.conv.bias"]
        ),
        st.sampled_from([torch.zeros(2, 3), torch.zeros(8), 3, "text"]),
    )
    names = data.draw(st.sets(st.sampled_from(sorted(state()))))
    content = data.draw(extra) | {name: state()[name] for name in names}
    path = tmp_path_factory.getbasetemp() / "drawn-weights.pth"
    torch.save(content, path)
    try:
        loaded = load_weights(Plain(), path)
    except InvalidFile:
        assert not names - {"norm.num_batches_tracked"}
        return
    said = [*loaded.taken.values(), *loaded.unknown, *(key for keys in loaded.unused.values() for key in keys)]
    said += [text.split()[0] for text in loaded.bent.values()]
    assert sorted(said) == sorted(content)
