"""A model in training and all that a step changes or needs; to a checkpoint and back, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmm.artifacts.checkpoint import FORMAT, versions
from pmm.config import Config, RecipeConfig
from pmm.data.crop_statistics import CropStatistics
from pmm.models.backbone import with_sync_batch_norm
from pmm.training.distributed import SINGLE, Processes
from pmm.training.precision import describe_precision, with_resolved_amp
from pmm.training.weight_average import WeightAverage
from pmm.utils.errors import BackendUnavailable, ConflictingOptions, InvalidFile

PAPER_EPOCHS = 400
FEW_CHANNELS = 16
"""A vector of AVX-512."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """A model in training, and all that a step changes or needs."""

    config: Config
    device: torch.device
    processes: Processes
    model: nn.Module
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

    @property
    def lr(self) -> float:
        """Learning rate of the next step (of the heads, where the backbone has another)."""
        return float(self.optimizer.param_groups[-1]["lr"])

    @property
    def frozen(self) -> bool:
        """Whether the weights of the backbone do not change."""
        return not next(self.model.backbone.parameters()).requires_grad  # type: ignore[union-attr]

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
    model: nn.Module, config: Config, device: torch.device, steps_per_epoch: int, processes: Processes = SINGLE
) -> TrainState:
    """`model` on `device` with optimizer and schedule, ready for `pmm.training.step.train_step` after `in_train_mode`.

    All processes call it. A precision of "auto" is resolved.
    """
    if config.recipe.amp == "auto":
        config = with_resolved_amp(config, device, processes)
    recipe = config.recipe
    if recipe.sync_bn:
        model = with_sync_batch_norm(model)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = WeightAverage(model, recipe.ema) if recipe.ema else None
    model.backbone.requires_grad_(not recipe.freeze_backbone)
    weights = list(model.parameters())
    groups = [{"params": [weights[index] for index in group]} for group in _parameter_groups(model)]
    optimizer = torch.optim.Adam(groups, lr=1.0, weight_decay=recipe.weight_decay, fused=True)
    last = recipe.epochs * steps_per_epoch - 1

    def rate(step: int, factor: float = 1.0) -> float:
        return factor * learning_rate(recipe, min(step, last), steps_per_epoch)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(rate, factor=recipe.backbone_lr), rate])
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
    )


def in_train_mode(state: TrainState, epoch: int) -> TrainState:
    """`state` with its model in training mode. In the first `freeze_backbone` epochs, from 1, the backbone's weights
    and batch statistics do not change."""
    frozen = epoch <= state.config.recipe.freeze_backbone
    state.model.train()
    if frozen:
        state.model.backbone.eval()  # type: ignore[union-attr]
    if frozen == state.frozen:
        return state
    state.model.backbone.requires_grad_(not frozen)
    # wrapped anew: DistributedDataParallel remembers which weights have gradients
    network, no_sync = _network(state.model, state.config, state.device, state.processes)
    return dataclasses.replace(state, network=network, no_sync=no_sync)


def _parameter_groups(model: nn.Module) -> tuple[list[int], list[int]]:
    """Positions in `model.parameters()` of the backbone's weights, and of all others."""
    backbone = {id(weight) for weight in model.backbone.parameters()}  # type: ignore[union-attr]
    own = [id(weight) in backbone for weight in model.parameters()]
    return [i for i, is_own in enumerate(own) if is_own], [i for i, is_own in enumerate(own) if not is_own]


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


def snapshot(
    state: TrainState,
    epoch: int,
    best: float,
    progress: Mapping[str, Any] | None = None,
    crop_statistics: CropStatistics | None = None,
) -> dict[str, Any]:
    """A run after `epoch` epochs, the content of a checkpoint (`restore_training` is its inverse).

    `best` is the best mAP on the held-out identities so far; `progress` is `Meter.state` of an epoch that has begun.
    The tensors are the state's own, which the next step changes: `pmm.training.saver` copies them.
    """
    cuda = torch.cuda.get_rng_state_all() if state.device.type == "cuda" else []
    schedule = {key: value for key, value in state.scheduler.state_dict().items() if key != "lr_lambdas"}
    return {
        "format": FORMAT,
        "model": dict(state.model.state_dict()),
        "ema": state.ema and state.ema.state_dict(),
        "config": state.config.to_dict(),
        "epoch": epoch,
        "optimizer": state.optimizer.state_dict(),
        "scheduler": schedule,
        "scaler": state.scaler.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        "progress": dict(progress) if progress else None,
        "best": best,
        "crop_statistics": dataclasses.asdict(crop_statistics) if crop_statistics else None,
        "versions": {**versions(), "precision": describe_precision(state.config, state.device)},
    }


def restore_training(saved: dict[str, Any], state: TrainState, path: Path) -> None:
    """Set all that a step changes, and the random number generators, to what was `saved` at `path` (see `snapshot`).

    Raises InvalidFile if a run cannot be resumed from it (a best.pth, or a checkpoint that was imported).
    """
    if not all(isinstance(saved[key], dict) for key in ("model", "optimizer", "scheduler", "rng")):
        raise InvalidFile(
            "it has weights but no state of the optimizer, like a best.pth or an imported checkpoint",
            path=path,
            hint="start a new run",
        )
    state.model.load_state_dict(saved["model"])
    if state.ema is not None:
        state.ema.load_state_dict(saved["ema"])
    state.optimizer.load_state_dict(_in_two_groups(saved["optimizer"], state.model))
    state.scheduler.load_state_dict(_of_two_groups(saved["scheduler"]))
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.lr_lambdas, strict=True):
        group["lr"] = rate(state.scheduler.last_epoch)  # a run that is extended has another schedule than before
    if saved["scaler"]:  # not if the run computed in another precision so far
        state.scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"]["torch"])
    if state.device.type == "cuda":
        for index, cuda in enumerate(saved["rng"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, index)


def _in_two_groups(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer as this version has it: fused, the backbone's weights in a group of their own."""
    groups = [{**group, "fused": True, "foreach": None} for group in saved["param_groups"]]
    if len(groups) == 1:
        (group,) = groups
        groups = [{**group, "params": [group["params"][i] for i in part]} for part in _parameter_groups(model)]
    return {**saved, "param_groups": groups}


def _of_two_groups(saved: dict[str, Any]) -> dict[str, Any]:
    """The state of a schedule, which once had one rate for all weights."""
    two = {key: saved[key] * 2 if len(saved[key]) == 1 else saved[key] for key in ("base_lrs", "_last_lr")}
    return {**saved, **two, "lr_lambdas": [None, None]}


def learning_rate(recipe: RecipeConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of iteration `step` (from 0).

    "paper": the steps of the published recipe by epoch e = 1..400, stretched to `recipe.epochs`: 1e-4 (e // 5 + 1)
    below 50, then 1e-3, 1e-4 from 200, 1e-5 from 300 (times recipe.lr / 1e-3). "flat-cosine": linear warm-up, flat,
    half a cosine down.
    """
    if recipe.schedule == "paper":
        epoch = (step // steps_per_epoch) * PAPER_EPOCHS // recipe.epochs + 1
        if epoch < 50:
            return recipe.lr / 10 * (epoch // 5 + 1)
        return recipe.lr * (1 if epoch < 200 else 0.1 if epoch < 300 else 0.01)
    done = (step + 1) / (recipe.epochs * steps_per_epoch)
    if done < recipe.warmup:
        return recipe.lr * done / recipe.warmup
    if done <= recipe.flat:
        return recipe.lr
    return recipe.lr * (1 + math.cos(math.pi * (done - recipe.flat) / (1 - recipe.flat))) / 2
