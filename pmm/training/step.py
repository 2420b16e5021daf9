"""One step of training."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pmm.data.batches import TrainBatch, normalize_batch
from pmm.data.preprocessing import preprocessing_of
from pmm.training.losses import reid_losses
from pmm.training.precision import HALF
from pmm.training.state import TrainState

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
PARTNERS = 4  # a stream of the run's seed, see pmm.data.sampler


def set_deterministic(device: torch.device, deterministic: bool) -> Callable[[], None]:
    """On CUDA ask for deterministic algorithms (one seed, one machine, one result to the bit), or for the fastest,
    which cuDNN finds by trying, in the whole process. On a CPU all of ours are deterministic.

    Call the result to restore what was set before.
    """
    undo = contextlib.ExitStack()
    if device.type == "cuda":
        cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        enabled = torch.are_deterministic_algorithms_enabled()
        undo.callback(torch.use_deterministic_algorithms, enabled, warn_only=warn_only)
        undo.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = not deterministic
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        if deterministic:
            undo.callback(setattr, memory, "fill_uninitialized_memory", memory.fill_uninitialized_memory)
            memory.fill_uninitialized_memory = False
            if CUBLAS not in os.environ:
                undo.callback(os.environ.pop, CUBLAS, None)
                os.environ[CUBLAS] = ":4096:8"
    return undo.close


def train_step(
    state: TrainState,
    batch: TrainBatch,
    *,
    epoch: int = 0,
    step: int = 0,
    on_losses: Callable[[dict[str, Tensor]], object] = lambda losses: None,
) -> dict[str, Tensor]:
    """One step on this process's share of a batch: the losses by name, their sum as "loss" and the model's figures, all
    scalars on the device.

    All random numbers of a step follow from (seed, epoch, step, share), so that they do not depend on earlier steps.
    `on_losses` is called with the losses as soon as they are known, before the last backward.
    """
    config, device, processes = state.config, state.device, state.processes
    recipe, parts = config.recipe, config.recipe.accumulate
    images = normalize_batch(batch, preprocessing_of(config), device)
    labels = batch.labels.to(device, non_blocking=True)
    state.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for part, (some, pids) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
        _seed(config.seed, PARTNERS, epoch, step, processes.rank * parts + part)
        with state.no_sync() if part + 1 < parts else contextlib.nullcontext():
            with torch.autocast(device.type, HALF.get(recipe.amp), enabled=recipe.amp in HALF):
                output = state.network(some, pids)
            gather_rows = processes.gather_rows if recipe.gather else None
            losses = reid_losses(output, pids, label_smoothing=recipe.label_smoothing, gather_rows=gather_rows)
            losses["loss"] = torch.stack(list(losses.values())).sum()
            for name, value in {**losses, **output.figures}.items():
                sums[name] = sums.get(name, 0) + value.detach() / parts
            if part + 1 == parts:
                on_losses(sums)
            state.scaler.scale(losses["loss"] / parts).backward()
    if recipe.clip_norm:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    with warnings.catch_warnings():  # where the scaler skips the optimizer's step, the schedule goes on
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        state.scheduler.step()
    if state.ema is not None:
        state.ema.update()
    return sums


def _seed(*stream: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def collapsed(losses: Mapping[str, float], num_classes: int) -> bool:
    """True if every stage's features are one point: triplet stuck at ln 2 and cross-entropy at ln K.

    The hardest positive is at least as far as the hardest negative there, so what distance is left adds to ln 2.
    """
    triplets = [value for name, value in losses.items() if name.startswith("triplet")]
    entropies = [value for name, value in losses.items() if name.startswith("cross_entropy")]
    return all(-0.01 < value - math.log(2) < 0.05 for value in triplets) and all(
        value > 0.98 * math.log(num_classes) for value in entropies
    )
