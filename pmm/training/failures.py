"""What is said of a training run that cannot go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from pmm.data.loader import LOST_WORKER
from pmm.training.distributed import LOST_PEER, PEER_ENDED
from pmm.utils.errors import UserError


@contextlib.contextmanager
def explained(out: Path, world: int) -> Iterator[None]:
    """A UserError for what torch raises in the run in `out`, of `world` processes, where a user, not a programmer, can
    do something."""
    try:
        yield
    except RuntimeError as error:
        if said := _said(error, out, world):
            raise UserError(said) from error
        raise


def _said(error: RuntimeError, out: Path, world: int) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, torch.OutOfMemoryError):
        again = "go on with --resume" if (out / "last.pth").exists() else "start again"
        advice = "or start a new run with --accumulate 2, --amp bf16 or a smaller --batch-size"
        return f"the GPU's memory is full ({text[:200]}); free some of it and {again}, {advice}"
    if LOST_WORKER in text:
        return f"a process that loads images has ended ({text}), as when memory runs out; use fewer --workers"
    if world > 1 and any(word in str(error) for word in LOST_PEER):
        return PEER_ENDED
    return ""


def not_finite(label: str, step: int, losses: Mapping[str, float], lr: float, where: str, advice: str) -> UserError:
    """One line for a loss that is NaN or Inf; `advice` as `RecipeConfig.gentler` gives it."""
    parts = ", ".join(f"{name} {value:.3g}" for name, value in losses.items() if name != "loss")
    return UserError(
        f"{label}, step {step}: the loss is {losses['loss']} ({parts}; lr {lr:.2g}); the batch's files are in {where}; "
        f"{advice}, then start again; the last checkpoint is from before this step"
    )
