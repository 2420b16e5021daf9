"""Steps of training: mixed precision, parts, clipping, and what is random in them."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

import pmm.training.step
from pmm.data.loader import train_batches
from pmm.data.readers import read_dataset
from pmm.models.registry import build_model
from pmm.recipe import RecipeConfig
from pmm.training.snapshot import restore_training, snapshot
from pmm.training.state import check_device, make_train_state
from pmm.training.step import set_deterministic, train_step
from pmm.utils.errors import ConflictingOptions
from tests.refusals import refuses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half_config(small_config):
    """Crops of half the height and width: a CPU takes long for a step in fp16."""
    return dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, height=64, width=32))


def first_batch(config, people):
    loader, _ = train_batches(read_dataset("synthetic", people).train, changed(config, batch_size=16))
    return next(iter(loader))


@pytest.fixture(scope="module")
def batch(half_config, people):
    return first_batch(half_config, people)


def changed(config, **recipe):
    model = dataclasses.replace(config.model, num_classes=12)
    return dataclasses.replace(config, model=model, recipe=dataclasses.replace(config.recipe, **recipe))


def state_of(config):
    torch.manual_seed(0)
    state = make_train_state(build_model(config), config, CPU, 10)
    state.model.train()
    return state


def scaled_by(state, scale):
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": scale})


def gradient(state):
    return torch.cat([p.grad.flatten() for p in state.model.parameters()])


def stepped(config, batch, **where):
    state = state_of(config)
    losses = train_step(state, batch, **where)
    return losses, gradient(state), state


def test_what_is_random_follows_from_epoch_and_step(half_config, batch):
    config = changed(half_config, batch_size=16)
    losses, expected, _ = stepped(config, batch, epoch=3, step=5)
    torch.rand(7)  # what was drawn before does not matter
    again, found, _ = stepped(config, batch, epoch=3, step=5)
    assert torch.equal(found, expected)
    assert losses == again
    for other in ({"epoch": 3, "step": 6}, {"epoch": 4, "step": 5}):
        assert not torch.equal(stepped(config, batch, **other)[1], expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_losses_are_known_before_the_last_backward(half_config, batch, parts):
    """So that a GPU is still at work while they are looked at."""
    config = changed(half_config, batch_size=16, accumulate=parts)
    state = state_of(config)
    steps, seen = [], []
    for parameter in state.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: steps.append("backward"))
    losses = train_step(state, batch, on_losses=lambda losses: (steps.append("losses"), seen.append(dict(losses))))
    assert seen == [losses]
    before = steps.index("losses")
    assert steps[before + 1 :] == ["backward"] * ((len(steps) - 1) // parts)
    assert not any(value.requires_grad for value in losses.values())


def test_losses_add_up(half_config, batch):
    losses, _, _ = stepped(changed(half_config, batch_size=16), batch)
    assert set(losses) == {"loss", *(f"{kind}{s}" for kind in ("triplet", "cross_entropy") for s in (1, 2, 3))}
    assert losses["loss"] == pytest.approx(float(sum(v for k, v in losses.items() if k != "loss")), rel=1e-6)
    assert not any(value.requires_grad for value in losses.values())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_near_fp32_and_computes_in_half(small_config, people, amp, monkeypatch):
    monkeypatch.setattr("pmm.training.precision.cpu_has_bf16", lambda: True)  # emulated on another, which is enough
    batch = first_batch(small_config, people)
    exact, expected, _ = stepped(changed(small_config, batch_size=16, amp="off"), batch)
    config = changed(small_config, batch_size=16, amp=amp)
    state = state_of(config)
    types = set()
    state.model.backbone.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    if amp == "fp16":
        scaled_by(state, 1.0)
    losses = train_step(state, batch)
    assert types == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert float(losses["loss"]) == pytest.approx(float(exact["loss"]), rel=0.02)
    cosine = torch.nn.functional.cosine_similarity(gradient(state), expected, 0)
    assert cosine > (0.6 if amp == "bf16" else 0.9)  # rounding chooses other blocks and triplets here and there
    assert state.scaler.is_enabled() == (amp == "fp16")


def test_a_step_that_overflows_in_fp16_is_left_out(half_config, batch):
    config = changed(half_config, batch_size=16, amp="fp16", ema=0.9)
    state = state_of(config)
    scaled_by(state, 2.0**60)
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    train_step(state, batch)
    for model in (state.model, state.deployed):
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert state.scaler.get_scale() == 2.0**59
    assert state.scheduler.last_epoch == 1  # time goes on


def test_a_resumed_run_scales_its_loss_as_before(half_config):
    config = changed(half_config, amp="fp16")
    state, resumed = state_of(config), state_of(config)
    scaled_by(state, 2.0**9)
    restore_training(snapshot(state, 1, -1.0), resumed, Path("last.pth"))
    assert resumed.scaler.state_dict() == state.scaler.state_dict()
    assert resumed.scaler.get_scale() == 2.0**9


def test_parts_are_whole_identities_with_batches_of_their_own(half_config, batch):
    """Two parts are the mean of two steps of half the batch with the same weights."""
    config = changed(half_config, batch_size=16, accumulate=2)
    losses, found, _ = stepped(config, batch)
    single = changed(half_config, batch_size=8)
    means, gradients, original = [], [], pmm.training.step._seed
    for half in range(2):
        part = type(batch)(*(value[8 * half : 8 * half + 8] for value in batch))
        state = state_of(single)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pmm.training.step, "_seed", lambda *stream, half=half: original(*stream[:-1], half))
            means.append(train_step(state, part)["loss"])
        gradients.append(gradient(state))
    torch.testing.assert_close(losses["loss"], sum(means) / 2)
    expected = sum(gradients) / 2
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_long_gradients_are_clipped(half_config, batch):
    _, free, _ = stepped(changed(half_config, batch_size=16), batch)
    assert free.norm() > 1
    _, clipped, _ = stepped(changed(half_config, batch_size=16, clip_norm=0.5), batch)
    assert clipped.norm() == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-6)
    config = changed(half_config, batch_size=16, clip_norm=0.5, amp="fp16")
    state = state_of(config)
    scaled_by(state, 256.0)
    train_step(state, batch)
    assert gradient(state).norm() == pytest.approx(0.5, rel=1e-2)  # of the gradient, not of the scaled one


def test_parts_and_processes_that_cannot_share_a_batch():
    recipe = RecipeConfig(batch_size=128, accumulate=2)
    assert recipe.ids_per_part(4) == 4
    assert recipe.ids_per_part(8) == 2
    facts = ("32 identities x 4 images", "3 processes x accumulate=2", "1, 2, 4, 8 or 16")
    with refuses(ConflictingOptions, *facts, hint="--batch-size 144"):
        recipe.ids_per_part(3)
    assert dataclasses.replace(recipe, batch_size=144).ids_per_part(3) == 6
    with refuses(ConflictingOptions, "accumulate=32", hint="--batch-size 256"):  # one identity each has no negative
        RecipeConfig(batch_size=128, accumulate=32)
    assert RecipeConfig(batch_size=256, accumulate=32).ids_per_part(1) == 2


def test_what_only_gpus_do(half_config):
    with refuses(ConflictingOptions, "cpu", options=("--sync-bn",), hint="leave it out"):
        check_device(changed(half_config, sync_bn=True), CPU)
    state = make_train_state(build_model(changed(half_config)), changed(half_config, sync_bn=True), CPU, 1)
    norms = [m for m in state.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    plain = build_model(changed(half_config))
    plain.load_state_dict(state.model.state_dict())  # a checkpoint of it is like any other


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_what_makes_a_run_deterministic_ends_with_it(monkeypatch, before, deterministic):
    def found():
        fills = torch.utils.deterministic.fill_uninitialized_memory
        algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.backends.cudnn.benchmark, algorithms, fills, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    outermost = found()
    torch.use_deterministic_algorithms(before)
    try:
        others = found()
        assert set_deterministic(CPU, deterministic)() is None
        undo = set_deterministic(torch.device("cuda"), deterministic)
        memory = (False, ":4096:8") if deterministic else (True, None)
        assert found() == (not deterministic, (deterministic, True), *memory)
        undo()
        assert found() == others
    finally:
        torch.use_deterministic_algorithms(False)
    assert found() == outermost


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_on_a_gpu_waits_for_nothing(half_config, batch, amp):
    device = torch.device("cuda")
    config = changed(half_config, batch_size=16, amp=amp, clip_norm=1.0)
    state = make_train_state(build_model(config), config, device, 10)
    state.model.train()
    pinned = type(batch)(*(part.pin_memory() for part in batch))
    for step in range(2):
        train_step(state, pinned, step=step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = train_step(state, pinned, step=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses["loss"].isfinite()
