"""A model in training and all that a step changes: optimizer, learning rate, scaler, and how the network is called."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmm.config import Config, RecipeConfig
from pmm.training.distributed import SINGLE, Processes
from pmm.utils.errors import UserError

PAPER_EPOCHS = 400


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """A model in training and all that a step changes."""

    model: nn.Module
    """Holds the weights."""
    network: Callable[..., Any]
    """Called with images [N, 3, H, W] and labels [N]: the model, distributed and compiled as the recipe says."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    """Of the gradients in fp16; else switched off."""
    unsynchronised: Callable[[], contextlib.AbstractContextManager[Any]]
    """Within it, gradients stay with each process."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])


def check_device(config: Config, device: torch.device) -> None:
    """Raise UserError for what torch cannot do on `device`."""
    if config.recipe.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn works on GPUs only; leave it out")


def make_train_state(
    model: nn.Module, config: Config, device: torch.device, steps_per_epoch: int, processes: Processes = SINGLE
) -> TrainState:
    """`model` on `device` with optimizer and schedule, ready for `pmm.training.step.train_step`."""
    recipe = config.recipe
    if recipe.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, weight_decay=recipe.weight_decay)
    last = recipe.epochs * steps_per_epoch - 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(recipe, min(step, last), steps_per_epoch)
    )
    network: Any = model
    unsynchronised: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    if processes.world > 1:
        devices = [device] if device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(
            model,
            device_ids=devices,
            gradient_as_bucket_view=True,
            # else gradients are bundled anew after the first step, a resumed run's too: other sums of the same numbers
            find_unused_parameters=device.type == "cpu",
        )
        unsynchronised = network.no_sync
    if recipe.compile:
        # a partner is drawn by the generator that an uncompiled step draws it with
        network = torch.compile(network, options={"fallback_random": True})
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    return TrainState(
        model=model,
        network=network,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        unsynchronised=unsynchronised,
    )


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
