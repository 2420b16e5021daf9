"""Checkpoints: one file of plain tensors and plain types that carries its configuration."""

from __future__ import annotations

import io
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch import nn

import pmm
from pmm.config import Config
from pmm.errors import UserError
from pmm.files import existing_file, write_file
from pmm.kernels import build_version
from pmm.models.registry import build_model

FORMAT = "pmm-checkpoint-1"
KEYS = ("format", "model", "config", "epoch", "optimizer", "scheduler", "scaler", "rng", "best", "versions")


def versions() -> dict[str, str]:
    """Versions of everything that shapes a trained weight."""
    return {
        "pmm": pmm.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "pmm kernels": build_version(),
    }


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all (temporary file, fsync, rename).

    Raises UserError if the disk is full or the path not writable; the old file is then intact.
    """
    missing = set(KEYS) ^ set(checkpoint)
    if missing:
        raise ValueError(f"checkpoint keys missing or unknown: {sorted(missing)}")
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getvalue())


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours on the CPU; code inside the file is never run.

    Raises UserError if the file is missing, truncated, of another format, or a pickle that carries code.
    """
    path = existing_file(path, "a checkpoint written by pmm.train")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle as torch once wrote
        raise UserError(f"{path}: truncated, or not a checkpoint; expected one written by pmm.train")
    try:
        with warnings.catch_warnings():  # torch guesses aloud at foreign formats; the line below says it
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a bad file with RuntimeError, UnpicklingError, EOFError, KeyError, ...
        text = str(error)
        if "Unsupported" in text or "unsupported" in text or "GLOBAL" in text:
            raise UserError(f"{path}: refused, the file holds more than plain tensors and could run code") from error
        raise UserError(f"{path}: truncated, or not a checkpoint ({_first_line(text)})") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        keys = ", ".join(map(str, list(checkpoint)[:5])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(f"{path}: not a PMM checkpoint (it holds: {keys}); expected one written by pmm.train")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: format {checkpoint['format']!r}; this version reads {FORMAT!r}")
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: incomplete checkpoint, without {', '.join(missing)}")
    return checkpoint


def restore_model(checkpoint: dict[str, Any], source: str | Path) -> tuple[nn.Module, Config]:
    """The trained model in eval mode and its configuration. Raises UserError if the weights do not fit key for key."""
    config = Config.from_dict(checkpoint["config"])
    model = build_model(config)
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]
        raise UserError(
            f"{source}: the weights do not fit the checkpoint's own configuration ({' '.join(lines)[:300]})"
        ) from error
    return model.eval(), config


def snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    config: Config,
    epoch: int,
    best: float,
) -> dict[str, Any]:
    """A training run after `epoch` epochs, as `save` writes it and `restore_training` takes it up."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    schedule = {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}
    return {
        "format": FORMAT,
        "model": {key: value.cpu().contiguous() for key, value in model.state_dict().items()},
        "config": config.to_dict(),
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule,
        "scaler": None,
        "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        "best": best,
        "versions": versions(),
    }


def restore_training(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    """Bring model, optimizer, scheduler and random number generators to where `state` was taken.

    Raises UserError if `state` cannot be resumed from (a best.pth, say).
    """
    if not all(isinstance(state[key], dict) for key in ("model", "optimizer", "scheduler", "rng")):
        raise UserError("last.pth holds no state to resume from (is it a copy of best.pth?); start a new run")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None]})
    torch.set_rng_state(state["rng"]["torch"])
    if state["rng"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])


def load_model(path: str | Path) -> nn.Module:
    """The model of a checkpoint in eval mode, on the CPU.

    It maps normalised float32 images [N, 3, H, W] to unnormalised embeddings [N, D].

    Raises UserError as `load`.
    """
    return restore_model(load(path), path)[0]


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:160]
