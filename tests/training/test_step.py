"""Steps of training: mixed precision, parts, clipping, and what is random in them."""

import dataclasses

import pytest
import torch

import pmm.training.step
from pmm.config import RecipeConfig
from pmm.data.loader import train_batches
from pmm.data.readers import read_dataset
from pmm.models.registry import build_model
from pmm.training.resume import restore_training, snapshot
from pmm.training.state import check_device, make_train_state
from pmm.training.step import train_step
from pmm.utils.errors import UserError

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


def trainee_of(config):
    torch.manual_seed(0)
    trainee = make_train_state(build_model(config), config, CPU, 10)
    trainee.model.train()
    return trainee


def scaled_by(trainee, scale):
    trainee.scaler.load_state_dict({**trainee.scaler.state_dict(), "scale": scale})


def gradient(trainee):
    return torch.cat([p.grad.flatten() for p in trainee.model.parameters()])


def stepped(config, batch, **where):
    trainee = trainee_of(config)
    losses = train_step(trainee, batch, config, CPU, **where)
    return losses, gradient(trainee), trainee


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
def test_the_losses_are_told_before_the_last_backward(half_config, batch, parts):
    """So that a GPU is still at work while they are looked at."""
    config = changed(half_config, batch_size=16, accumulate=parts)
    trainee = trainee_of(config)
    steps, told = [], []
    for parameter in trainee.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: steps.append("backward"))
    losses = train_step(
        trainee, batch, config, CPU, found=lambda losses: (steps.append("told"), told.append(dict(losses)))
    )
    assert told == [losses]
    before = steps.index("told")
    assert steps[before + 1 :] == ["backward"] * ((len(steps) - 1) // parts)
    assert not any(value.requires_grad for value in losses.values())


def test_losses_add_up(half_config, batch):
    losses, _, _ = stepped(changed(half_config, batch_size=16), batch)
    assert set(losses) == {"loss", *(f"{kind}{s}" for kind in ("triplet", "cross_entropy") for s in (1, 2, 3))}
    assert losses["loss"] == pytest.approx(float(sum(v for k, v in losses.items() if k != "loss")), rel=1e-6)
    assert not any(value.requires_grad for value in losses.values())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_near_fp32_and_computes_in_half(small_config, people, amp):
    batch = first_batch(small_config, people)
    exact, expected, _ = stepped(changed(small_config, batch_size=16), batch)
    config = changed(small_config, batch_size=16, amp=amp)
    trainee = trainee_of(config)
    types = set()
    trainee.model.backbone.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    if amp == "fp16":
        scaled_by(trainee, 1.0)
    losses = train_step(trainee, batch, config, CPU)
    assert types == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert float(losses["loss"]) == pytest.approx(float(exact["loss"]), rel=0.02)
    cosine = torch.nn.functional.cosine_similarity(gradient(trainee), expected, 0)
    assert cosine > (0.6 if amp == "bf16" else 0.9)  # rounding chooses other blocks and triplets here and there
    assert trainee.scaler.is_enabled() == (amp == "fp16")


def test_a_step_that_overflows_in_fp16_is_left_out(half_config, batch):
    config = changed(half_config, batch_size=16, amp="fp16")
    trainee = trainee_of(config)
    scaled_by(trainee, 2.0**60)
    before = {name: value.clone() for name, value in trainee.model.named_parameters()}
    train_step(trainee, batch, config, CPU)
    assert all(torch.equal(value, before[name]) for name, value in trainee.model.named_parameters())
    assert trainee.scaler.get_scale() == 2.0**59
    assert trainee.scheduler.last_epoch == 1  # time goes on


def test_a_resumed_run_scales_its_loss_as_before(half_config):
    config = changed(half_config, amp="fp16")
    trainee, resumed = trainee_of(config), trainee_of(config)
    scaled_by(trainee, 2.0**9)
    restore_training(snapshot(trainee, config, 1, -1.0), resumed)
    assert resumed.scaler.state_dict() == trainee.scaler.state_dict()
    assert resumed.scaler.get_scale() == 2.0**9


def test_parts_are_whole_identities_with_batches_of_their_own(half_config, batch):
    """Two parts are the mean of two steps of half the batch with the same weights."""
    config = changed(half_config, batch_size=16, accumulate=2)
    losses, found, _ = stepped(config, batch)
    single = changed(half_config, batch_size=8)
    means, gradients, original = [], [], pmm.training.step._seed
    for half in range(2):
        part = type(batch)(*(value[8 * half : 8 * half + 8] for value in batch))
        trainee = trainee_of(single)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pmm.training.step, "_seed", lambda *stream, half=half: original(*stream[:-1], half))
            means.append(train_step(trainee, part, single, CPU)["loss"])
        gradients.append(gradient(trainee))
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
    trainee = trainee_of(config)
    scaled_by(trainee, 256.0)
    train_step(trainee, batch, config, CPU)
    assert gradient(trainee).norm() == pytest.approx(0.5, rel=1e-2)  # of the gradient, not of the scaled one


def test_parts_and_processes_that_cannot_share_a_batch():
    recipe = RecipeConfig(batch_size=128, accumulate=2)
    assert recipe.ids_per_part(4) == 4
    assert recipe.ids_per_part(8) == 2
    with pytest.raises(
        UserError, match=r"32 identities x 4 images, which 3 processes x accumulate=2 cannot share"
    ) as e:
        recipe.ids_per_part(3)
    assert "processes x accumulate may be 1, 2, 4, 8, 16, or use --batch-size 144" in str(e.value)
    assert dataclasses.replace(recipe, batch_size=144).ids_per_part(3) == 6
    with pytest.raises(UserError, match="accumulate=32 cannot share") as e:  # one identity each has no negative
        RecipeConfig(batch_size=128, accumulate=32)
    assert RecipeConfig(batch_size=256, accumulate=32).ids_per_part(1) == 2
    assert "--batch-size 256" in str(e.value)


def test_what_only_gpus_do(half_config):
    with pytest.raises(UserError, match="--sync-bn works on GPUs only"):
        check_device(changed(half_config, sync_bn=True), CPU)
    trainee = make_train_state(build_model(changed(half_config)), changed(half_config, sync_bn=True), CPU, 1)
    norms = [m for m in trainee.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    plain = build_model(changed(half_config))
    plain.load_state_dict(trainee.model.state_dict())  # a checkpoint of it is like any other


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_on_a_gpu_waits_for_nothing(half_config, batch, amp):
    device = torch.device("cuda")
    config = changed(half_config, batch_size=16, amp=amp, clip_norm=1.0)
    trainee = make_train_state(build_model(config), config, device, 10)
    trainee.model.train()
    pinned = type(batch)(*(part.pin_memory() for part in batch))
    for step in range(2):
        train_step(trainee, pinned, config, device, step=step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = train_step(trainee, pinned, config, device, step=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses["loss"].isfinite()
