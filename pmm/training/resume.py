"""A training run to a checkpoint and back, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pmm.artifacts.checkpoint import FORMAT, versions
from pmm.config import Config
from pmm.training.state import TrainState
from pmm.utils.errors import UserError


def snapshot(
    trainee: TrainState, config: Config, epoch: int, best: float, progress: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A training run after `epoch` epochs, as `save` writes it and `restore_training` takes it up.

    `progress`: what the epoch after them has done so far, None if it has not begun.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    schedule = {key: value for key, value in trainee.scheduler.state_dict().items() if key != "lr_lambdas"}
    return {
        "format": FORMAT,
        "model": {key: value.cpu().contiguous() for key, value in trainee.model.state_dict().items()},
        "config": config.to_dict(),
        "epoch": epoch,
        "optimizer": trainee.optimizer.state_dict(),
        "scheduler": schedule,
        "scaler": trainee.scaler.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        "progress": dict(progress) if progress else None,
        "best": best,
        "versions": versions(),
    }


def restore_training(state: dict[str, Any], trainee: TrainState) -> None:
    """Bring all that a step changes, and the random number generators, to where `state` was taken.

    Raises UserError if `state` cannot be resumed from (a best.pth or an imported one, say).
    """
    if not all(isinstance(state[key], dict) for key in ("model", "optimizer", "scheduler", "rng")):
        raise UserError("last.pth holds no state to resume from (is it best.pth, or imported?); start a new run")
    trainee.model.load_state_dict(state["model"])
    trainee.optimizer.load_state_dict(state["optimizer"])
    trainee.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None]})
    trainee.scaler.load_state_dict(state["scaler"] or {})
    torch.set_rng_state(state["rng"]["torch"])
    for index, cuda in enumerate(state["rng"]["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, index)
