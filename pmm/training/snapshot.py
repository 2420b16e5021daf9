"""The state of a training to a checkpoint and back, to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pmm.artifacts.checkpoint import FORMAT, versions
from pmm.data.crop_statistics import CropStatistics
from pmm.training.precision import describe_precision
from pmm.training.state import TrainState
from pmm.utils.errors import InvalidFile, reason_of


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

    Raises InvalidFile if a run cannot be resumed from it (a best.pth, a checkpoint that was imported, or one of another
    version).
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
    try:
        state.optimizer.load_state_dict(saved["optimizer"])
        state.scheduler.load_state_dict({**saved["scheduler"], "lr_lambdas": []})
    except (ValueError, KeyError) as error:
        problem = f"its state of the optimizer is not that of this version ({reason_of(error)})"
        hint = "resume it with the version that wrote it, or start a new run from its weights: --init FILE"
        raise InvalidFile(problem, path=path, hint=hint) from error
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.lr_lambdas, strict=True):
        group["lr"] = rate(state.scheduler.last_epoch)  # a run that is extended has another schedule than before
    if saved["scaler"]:  # not if the run computed in another precision so far
        state.scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"]["torch"])
    if state.device.type == "cuda":
        for index, cuda in enumerate(saved["rng"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, index)
