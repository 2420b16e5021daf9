"""Checkpoints: one file of plain tensors and plain types that carries its configuration."""

from __future__ import annotations

import dataclasses
import io
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.config import Config, DataConfig, preset
from pmm.utils.build_info import build_version
from pmm.utils.errors import UserError
from pmm.utils.files import sha256, write_file
from pmm.utils.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from pmm.training.state import Trainee

FORMAT = "pmm-checkpoint-1"
KEYS = ("format", "model", "config", "epoch", "optimizer", "scheduler", "scaler", "rng", "progress", "best", "versions")


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

    Raises UserError if the disk is full or the path not writable; the old file is then intact.
    """
    import torch

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
    from pmm.artifacts.checkpoint_import import describe, method_of
    from pmm.artifacts.torch_file import read_torch_file

    checkpoint = read_torch_file(path, "a checkpoint written by pmm train")
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        keys = ", ".join(map(str, list(checkpoint)[:5])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        known, advice = describe(checkpoint), "expected one written by pmm train"
        if method_of(checkpoint):
            advice = f"first turn it into one: pmm import {shlex.quote(str(path))} -o CKPT.pth"
        raise UserError(f"{path}: not a PMM checkpoint (it holds: {keys}); {known or advice}")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: format {checkpoint['format']!r}; this version reads {FORMAT!r}")
    checkpoint.setdefault("progress", None)  # files from before epochs could be interrupted have none
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: incomplete checkpoint, without {', '.join(missing)}")
    return checkpoint


def restore_model(checkpoint: dict[str, Any], source: str | Path) -> tuple[nn.Module, Config]:
    """The trained model in eval mode and its configuration. Raises UserError if the weights do not fit key for key."""
    from pmm.models.registry import build_model

    try:
        config = Config.from_dict(checkpoint["config"])
        model = build_model(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]
        raise UserError(
            f"{source}: the weights do not fit the checkpoint's own configuration ({' '.join(lines)[:300]})"
        ) from error
    return model.eval(), config


def snapshot(
    trainee: Trainee, config: Config, epoch: int, best: float, progress: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A training run after `epoch` epochs, as `save` writes it and `restore_training` takes it up.

    `progress`: what the epoch after them has done so far, None if it has not begun.
    """
    import torch

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


def for_deployment(state: dict[str, Any]) -> dict[str, Any]:
    """`state` without what only a resumed run needs."""
    return state | dict.fromkeys(("optimizer", "scheduler", "scaler", "rng", "progress"))


def restore_training(state: dict[str, Any], trainee: Trainee) -> None:
    """Bring all that a step changes, and the random number generators, to where `state` was taken.

    Raises UserError if `state` cannot be resumed from (a best.pth or an imported one, say).
    """
    import torch

    if not all(isinstance(state[key], dict) for key in ("model", "optimizer", "scheduler", "rng")):
        raise UserError("last.pth holds no state to resume from (is it best.pth, or imported?); start a new run")
    trainee.model.load_state_dict(state["model"])
    trainee.optimizer.load_state_dict(state["optimizer"])
    trainee.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None]})
    trainee.scaler.load_state_dict(state["scaler"] or {})
    torch.set_rng_state(state["rng"]["torch"])
    for index, cuda in enumerate(state["rng"]["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, index)


def load_model(path: str | Path) -> nn.Module:
    """The model of a checkpoint in eval mode, on the CPU.

    It maps normalised float32 images [N, 3, H, W] to embeddings [N, D], of length 1 if its `normalised` says so.

    Raises UserError as `load`.
    """
    return restore_model(load(path), path)[0]


def import_foreign(source: Path, out: Path, data: DataConfig, *, identities: int | None = None) -> str:
    """Write the checkpoint `source` of the PMM authors' code, or of BDB's, as one of ours to `out`.

    Args:
        source: what their training script saved, or the bare state dict.
        out: file to write.
        data: crop size and data set of the new configuration; the rest is preset paper's, and the file's shapes.
        identities: that the data set has for training, if it is at hand.

    Returns:
        One line: what was read.

    Raises:
        UserError: another kind of file, weights that are not exactly those of the network (`pmm.artifacts.checkpoint_import.convert`), or
            crops too small for it.
    """
    import torch

    from pmm.artifacts.checkpoint_import import CODE, EXPECTED, convert
    from pmm.artifacts.torch_file import read_torch_file
    from pmm.models.registry import build_model

    content = read_torch_file(source, EXPECTED)
    if isinstance(content, dict) and str(content.get("format", "")).startswith("pmm-checkpoint"):
        raise UserError(f"{source}: a checkpoint of ours, nothing to import; every command takes it as it is")
    found = convert(content, source)
    base = preset("paper")
    model = dataclasses.replace(
        base.model,
        method=found.method,
        weights="none",
        num_classes=found.num_classes,
        feature_dim=found.feature_dim,
    )
    config = dataclasses.replace(base, data=data, model=model)
    with torch.device("meta"):
        build_model(config)  # a crop size that the network does not take would be refused by every later command
    code = CODE[found.method]
    checkpoint = {
        **dict.fromkeys(KEYS),
        "format": FORMAT,
        "model": found.model,
        "config": config.to_dict(),
        "epoch": found.epoch or 0,
        "best": -1.0,
        # ours did not train it: nothing may later say so
        "versions": {**versions(), "pmm kernels": f"none, imported from {code}", "imported": sha256(source)},
    }
    save(out, checkpoint)
    epoch = "an unknown epoch" if found.epoch is None else f"epoch {found.epoch}"
    line = f"{source}: {found.method} of {code}, {found.num_classes} identities, {epoch}, {found.tensors} tensors"
    notes = found.notes
    if identities not in (None, found.num_classes):
        notes = (*notes, f"the data set has {identities} identities for training: it was trained on another")
    return "; ".join((line, *notes))
