"""A model in training and all that a step changes or needs, per phase."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pmm.config import Config
from pmm.models.backbone import with_sync_batch_norm
from pmm.models.output import ReidModel
from pmm.models.phases import Phase
from pmm.models.registry import phases_of
from pmm.recipe import RecipeConfig
from pmm.training.distributed import SINGLE, Processes
from pmm.training.precision import with_resolved_amp
from pmm.training.weight_average import WeightAverage
from pmm.utils.errors import BackendUnavailable, ConflictingOptions

PAPER_EPOCHS = 400
MOMENTUM = 0.9
FEW_CHANNELS = 16
"""A vector of AVX-512."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """A model in training, and all that a step changes or needs."""

    config: Config
    device: torch.device
    processes: Processes
    model: ReidModel
    """Holds the weights."""
    network: Callable[..., Any]
    """Called with images [N, 3, H, W] and labels [N]: the model, distributed and compiled as the recipe says."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    """Of the loss in fp16; else switched off."""
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]]
    """Within it, processes do not average their gradients."""
    steps_per_epoch: int
    ema: WeightAverage | None
    """The average of the weights over the steps, if the recipe has one."""
    phase: Phase
    """The current one."""
    trainable: frozenset[str]
    """Names of the weights that are trained in some phase."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step (of the heads, where the backbone has another)."""
        return float(self.optimizer.param_groups[-1]["lr"])

    @property
    def deployed(self) -> nn.Module:
        """The model that is evaluated and deployed: with the averaged weights, if there are any."""
        return self.model if self.ema is None else self.ema.module


def check_device(config: Config, device: torch.device) -> None:
    """Raises ConflictingOptions for what torch cannot do on `device`."""
    if config.recipe.sync_bn and device.type != "cuda":
        raise ConflictingOptions(f"--sync-bn works on GPUs only, not on {device}", "--sync-bn", hint="leave it out")


def check_network_on(device: torch.device, model: nn.Module) -> None:
    """Raises BackendUnavailable for a network whose backward pass writes beyond its memory on a CPU.

    So do oneDNN's strided 1x1 convolutions of few channels in channels_last (of the stems of RepVGG and MobileOne),
    seen with torch 2.14 and AVX-512: the gradient of 3 channels of 128x64 is NaN, or the process ends without a word.
    """
    if device.type != "cpu":
        return
    for name, layer in model.named_modules():
        pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
        if pointwise and layer.in_channels < FEW_CHANNELS:
            why = f"a strided 1x1 convolution of {layer.in_channels} channels"
            hint = "train on a GPU, or use another --backbone"
            raise BackendUnavailable(f"torch cannot train {name} on a CPU ({why})", hint=hint)


def make_train_state(
    model: ReidModel,
    config: Config,
    device: torch.device,
    steps_per_epoch: int,
    processes: Processes = SINGLE,
    phase: Phase | None = None,
) -> TrainState:
    """`model` on `device` with optimizer and schedule of `phase` (default: the first), ready for
    `pmm.training.step.train_step` after `in_train_mode`.

    All processes call it. A precision of "auto" is resolved.
    """
    if config.recipe.amp == "auto":
        config = with_resolved_amp(config, device, processes)
    if config.recipe.sync_bn:
        with_sync_batch_norm(model)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainable = frozenset(name for name, weight in model.named_parameters() if weight.requires_grad)
    phase = phase or phases_of(config)[0]
    return _begin(model, config, device, processes, steps_per_epoch, phase, trainable)


def next_phase(state: TrainState, phase: Phase) -> TrainState:
    """`state` with the optimizer, the schedule and the average of a `phase` that begins; the weights stay."""
    config, device, processes = state.config, state.device, state.processes
    return _begin(state.model, config, device, processes, state.steps_per_epoch, phase, state.trainable)


def _begin(
    model: ReidModel,
    config: Config,
    device: torch.device,
    processes: Processes,
    steps_per_epoch: int,
    phase: Phase,
    trainable: frozenset[str],
) -> TrainState:
    recipe = phase.recipe
    model.start_phase(phase.name)
    average = WeightAverage(model, recipe.ema) if recipe.ema else None
    choose_weights(model, phase, trainable, frozen=config.recipe.freeze_backbone > phase.begin)
    optimizer = _optimizer(model, recipe)
    scheduled, before = (config.recipe, phase.begin * steps_per_epoch) if phase.goes_on else (recipe, 0)
    last = recipe.epochs * steps_per_epoch - 1

    def rate(step: int, factor: float = 1.0) -> float:
        return factor * learning_rate(scheduled, before + min(step, last), steps_per_epoch)

    factors = [recipe.backbone_lr if group.backbone else 1.0 for group in weight_groups(model, recipe)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(rate, factor=factor) for factor in factors])
    network, no_sync = _network(model, config, device, processes)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    return TrainState(
        config=config,
        device=device,
        processes=processes,
        model=model,
        network=network,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        no_sync=no_sync,
        steps_per_epoch=steps_per_epoch,
        ema=average,
        phase=phase,
        trainable=trainable,
    )


def _optimizer(model: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """With rate 1 in each group, which the schedule multiplies."""
    groups = [
        {"params": group.weights, "weight_decay": recipe.weight_decay if group.decays else 0.0}
        for group in weight_groups(model, recipe)
    ]
    if recipe.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=1.0, fused=True)
    return torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, nesterov=recipe.optimizer == "nesterov", fused=True)


def choose_weights(model: nn.Module, phase: Phase, trainable: Container[str], *, frozen: bool) -> bool:
    """Let the weights that `phase` trains have gradients, of the backbone only if it is not `frozen`.

    Returns whether that changed anything.
    """
    changed = False
    for name, weight in model.named_parameters():
        trained = name in trainable and phase.trains(name) and not (frozen and name.startswith("backbone."))
        changed |= weight.requires_grad != trained
        weight.requires_grad_(trained)
    return changed


def in_train_mode(state: TrainState, epoch: int) -> TrainState:
    """`state` with its model in training mode. In the first `freeze_backbone` epochs, from 1, the backbone's weights
    and batch statistics do not change."""
    frozen = epoch <= state.config.recipe.freeze_backbone
    state.model.train()
    if frozen:
        state.model.backbone.eval()  # type: ignore[union-attr]
    if not choose_weights(state.model, state.phase, state.trainable, frozen=frozen):
        return state
    # wrapped anew: DistributedDataParallel remembers which weights have gradients
    network, no_sync = _network(state.model, state.config, state.device, state.processes)
    return dataclasses.replace(state, network=network, no_sync=no_sync)


class WeightGroup(NamedTuple):
    """Weights that have a learning rate and a decay in common."""

    weights: list[nn.Parameter]
    backbone: bool
    decays: bool


def weight_groups(model: nn.Module, recipe: RecipeConfig) -> list[WeightGroup]:
    """The weights of the backbone, then all others. For adamw each in two groups, those that do not decay first: the
    vectors, which are scales and shifts of norms, and biases."""
    groups = []
    for backbone in (True, False):
        of_part = [each for name, each in model.named_parameters() if name.startswith("backbone.") == backbone]
        if recipe.optimizer == "adamw":
            vectors = [weight for weight in of_part if weight.dim() <= 1]
            groups.append(WeightGroup(vectors, backbone, decays=False))
            of_part = [weight for weight in of_part if weight.dim() > 1]
        groups.append(WeightGroup(of_part, backbone, decays=True))
    return groups


def _network(
    model: nn.Module, config: Config, device: torch.device, processes: Processes
) -> tuple[Any, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """`TrainState.network` and `TrainState.no_sync`."""
    network: Any = model
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    if processes.world > 1:
        devices = [device] if device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(
            model,
            device_ids=devices,
            gradient_as_bucket_view=True,
            # else torch bundles gradients anew after the first step of a run or of a resumed run: sums in another order
            find_unused_parameters=device.type == "cpu",
        )
        no_sync = network.no_sync
    if config.recipe.compile:
        # a compiled step draws partners with the generator of an uncompiled one
        network = torch.compile(network, options={"fallback_random": True})
    return network, no_sync


def learning_rate(recipe: RecipeConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of iteration `step` (from 0).

    "paper": the steps of the published recipe by epoch e = 1..400, stretched to `recipe.epochs`: 1e-4 (e // 5 + 1)
    below 50, then 1e-3, 1e-4 from 200, 1e-5 from 300 (times recipe.lr / 1e-3). "flat-cosine": linear warm-up, flat,
    half a cosine down. "milestones": linear warm-up, flat, a tenth from the epoch after each milestone on.
    """
    if recipe.schedule == "paper":
        epoch = (step // steps_per_epoch) * PAPER_EPOCHS // recipe.epochs + 1
        if epoch < 50:
            return recipe.lr / 10 * (epoch // 5 + 1)
        return recipe.lr * (1 if epoch < 200 else 0.1 if epoch < 300 else 0.01)
    done = (step + 1) / (recipe.epochs * steps_per_epoch)
    if done < recipe.warmup:
        return recipe.lr * done / recipe.warmup
    if recipe.schedule == "milestones":
        epoch = step // steps_per_epoch
        return recipe.lr * 0.1 ** sum(epoch >= round(share * recipe.epochs) for share in recipe.milestones)
    if done <= recipe.flat:
        return recipe.lr
    return recipe.lr * (1 + math.cos(math.pi * (done - recipe.flat) / (1 - recipe.flat))) / 2
