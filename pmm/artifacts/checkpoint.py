"""Checkpoints: one file of plain tensors and plain types that carries its configuration."""

from __future__ import annotations

import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.artifacts.known_checkpoints import describe, method_of
from pmm.config import Config
from pmm.utils.build_info import __version__, build_version
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.files import replacing

if TYPE_CHECKING:
    from pmm.models.output import ReidModel

FORMAT = "pmm-checkpoint-1"
EXPECTED = "a checkpoint written by pmm train"
KEYS = (
    "format", "model", "ema", "config", "epoch", "optimizer", "scheduler", "scaler", "rng", "progress", "best",
    "versions",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that shapes a trained weight."""
    import numpy as np
    import PIL
    import simplejpeg
    import torch
    import torchvision

    return {
        "pmm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "pmm kernels": build_version(),
    }


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all (temporary file, fsync, rename).

    Raises CannotWrite if the disk is full or the path not writable; the old file is then intact.
    """
    import torch

    missing = set(KEYS) ^ set(checkpoint)
    if missing:
        raise ValueError(f"checkpoint keys missing or unknown: {sorted(missing)}")
    # an open file, not its path: torch closes a file that it opened with Python's lock held, for 0.1 s or more
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what torch makes of a write that failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of pmm train on the CPU; code inside the file is never run.

    Raises InvalidFile if the file is missing, truncated, of another format, or a pickle that carries code.
    """
    from pmm.artifacts.torch_file import read_torch_file

    checkpoint = read_torch_file(path, EXPECTED)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        keys = ", ".join(map(str, list(checkpoint)[:5])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        hint = describe(checkpoint) or ""
        if not hint and method_of(checkpoint):
            hint = f"first turn it into one: pmm import {shlex.quote(str(path))} -o CKPT.pth"
        raise InvalidFile(f"not a PMM checkpoint (it holds: {keys})", path=path, expected=EXPECTED, hint=hint)
    if (form := checkpoint["format"]) != FORMAT:
        raise InvalidFile(f"its format is {form!r}", path=path, expected=f"{FORMAT!r}, which this version reads")
    for key in ("progress", "ema"):  # which older files do not have
        checkpoint.setdefault(key, None)
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise InvalidFile(f"incomplete checkpoint, without {', '.join(missing)}", path=path)
    return checkpoint


def restore_model(checkpoint: dict[str, Any], source: str | Path) -> tuple[ReidModel, Config]:
    """The trained model in eval mode and its configuration. Raises InvalidFile, of the path `source`, if the weights
    do not fit key for key."""
    from pmm.models.registry import build_model

    try:
        config = Config.from_dict(checkpoint["config"])
        model = build_model(config)
    except UserError as error:
        raise InvalidFile(str(error), path=source) from error
    try:
        model.load_state_dict(_deployed_weights(checkpoint))
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]
        raise InvalidFile(
            f"the weights do not fit the checkpoint's own configuration ({' '.join(lines)[:300]})", path=source
        ) from error
    return model.eval(), config


def for_deployment(state: dict[str, Any]) -> dict[str, Any]:
    """`state` without what only a resumed run needs."""
    rest = dict.fromkeys(("ema", "optimizer", "scheduler", "scaler", "rng", "progress"))
    return state | rest | {"model": _deployed_weights(state)}


def _deployed_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The averages over the steps, if the run has them, else the weights as the last step left them."""
    if state["ema"] is None:
        return state["model"]
    return state["ema"]["model"]


def load_model(path: str | Path) -> ReidModel:
    """The model of a checkpoint in eval mode, on the CPU.

    It maps normalised float32 images [N, 3, H, W] to embeddings [N, D], of norm 1 if its `normalised` says so.

    Raises InvalidFile as `load`.

    Example:
        >>> model = pmm.load_model("best.pth")
        >>> model.training, model.embedding_dim
        (False, 384)
    """
    return restore_model(load(path), path)[0]
