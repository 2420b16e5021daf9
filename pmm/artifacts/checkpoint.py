"""Checkpoints: one file of plain tensors and plain types that carries its configuration."""

from __future__ import annotations

import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.artifacts.adopted_file import is_adopted_network
from pmm.artifacts.known_checkpoints import describe_known, known_method
from pmm.config import Config
from pmm.data.crop_statistics import CropStatistics
from pmm.utils.build_info import __version__, build_version
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.from_dict import from_dict
from pmm.utils.hardware import installed_version

if TYPE_CHECKING:
    from pmm.models.output import ReidModel

FORMAT = "pmm-checkpoint-1"
EXPECTED = "a checkpoint written by pmm train"
TYPES: dict[str, Any] = {
    "format": str,
    "model": dict,
    "ema": dict | None,
    "config": dict,
    "epoch": int,
    **dict.fromkeys(("optimizer", "scheduler", "scaler", "rng", "progress"), dict | None),
    "best": float,
    "crop_statistics": dict | None,
    "versions": dict,
}
"""Key -> what is there; what is within the weights and the versions is for `_wrong_type`."""
KEYS = tuple(TYPES)


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
        **({"timm": timm} if (timm := installed_version("timm")) else {}),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "pmm kernels": build_version(),
    }


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all. Raises as `write_torch_file`."""
    from pmm.artifacts.torch_file import write_torch_file

    missing = set(KEYS) ^ set(checkpoint)
    if missing:
        raise ValueError(f"checkpoint keys missing or unknown: {sorted(missing)}")
    write_torch_file(path, checkpoint)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of pmm train on the CPU; code inside the file is never run.

    Raises InvalidFile if the file is missing, truncated, of another format, or a pickle that carries code.
    """
    from pmm.artifacts.torch_file import read_torch_file

    return checked(read_torch_file(path, EXPECTED), path)


def is_checkpoint(content: Any) -> bool:
    """Whether `content`, as torch.load returns it, is a checkpoint of pmm, of whatever version."""
    return isinstance(content, dict) and str(content.get("format", "")).startswith("pmm-checkpoint-")


def checked(content: Any, path: str | Path) -> dict[str, Any]:
    """`content` of the file `path`, as torch.load returns it, with every key that this version writes.

    Raises InvalidFile if it is no checkpoint of pmm, of another format, or holds anything of another type.
    """
    if not isinstance(content, dict) or "format" not in content:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        hint = describe_known(content, path) or ""
        if not hint and known_method(content):
            hint = f"first turn it into one: pmm import {shlex.quote(str(path))} -o CKPT.pth"
        raise InvalidFile(f"not a PMM checkpoint (it holds: {keys})", path=path, expected=EXPECTED, hint=hint)
    if is_adopted_network(content):
        problem = "it holds an adopted network, which can be evaluated, exported and benched, and nothing else"
        hint = "train it with its own code, and adopt what comes of it"
        raise InvalidFile(problem, path=path, expected=EXPECTED, hint=hint)
    if (form := content["format"]) != FORMAT:
        hint = "read it with the version that wrote it, or train again"
        expected = f"{FORMAT!r}, which this version reads"
        raise InvalidFile(f"its format is {form!r}", path=path, expected=expected, hint=hint)
    missing = [key for key in KEYS if key not in content]
    if missing:
        hint = "train again, or read it with the version that wrote it"
        raise InvalidFile(f"incomplete checkpoint, without {', '.join(missing)}", path=path, hint=hint)
    if problem := _wrong_type(content):
        raise InvalidFile(problem, path=path, expected=EXPECTED)
    return content


def _wrong_type(content: dict[str, Any]) -> str:
    """What in `content` is of another type than this version writes, so that no reader has to ask; empty if nothing."""
    from torch import Tensor

    for key, type_ in TYPES.items():
        if not isinstance(content[key], type_):
            return f"its {key} is of type {type(content[key]).__name__}"
    try:
        statistics_of(content)
    except (ValueError, UserError) as error:
        return f"its crop_statistics are none ({error})"
    ema = content["ema"]
    tables = [("model", content["model"], Tensor), ("versions", content["versions"], str)]
    if ema is not None:
        if not isinstance(ema.get("model"), dict) or not isinstance(ema.get("steps"), int):
            return "its ema is without weights, or their number of steps"
        tables.append(("ema.model", ema["model"], Tensor))
    for name, table, type_ in tables:
        for key, value in table.items():
            if not isinstance(key, str):
                return f"its {name} has {key!r} in place of a name"
            if not isinstance(value, type_):
                return f"{key!r} of its {name} is of type {type(value).__name__}"
    return ""


def restore_model(checkpoint: dict[str, Any], source: str | Path) -> tuple[ReidModel, Config]:
    """The trained model in eval mode and its configuration. Raises InvalidFile, of the path `source`, if the weights
    do not fit key for key."""
    from pmm.models.phases import phase_of
    from pmm.models.registry import build_model, phases_of

    try:
        config = Config.from_dict(checkpoint["config"])
        model = build_model(config)
    except UserError as error:
        raise InvalidFile(str(error), path=source) from error
    try:
        model.load_state_dict(deployed_weights(checkpoint))
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]
        raise InvalidFile(
            f"the weights do not fit the checkpoint's own configuration ({' '.join(lines)[:300]})", path=source
        ) from error
    model.start_phase(phase_of(phases_of(config), epoch_of(checkpoint)).name)
    return model.eval(), config


def epoch_of(checkpoint: dict[str, Any]) -> int:
    """The epoch of the last step, counted from 1, whether it has ended or not; 0 before the first step."""
    return checkpoint["epoch"] + bool((checkpoint["progress"] or {}).get("steps", 0))


def statistics_of(checkpoint: dict[str, Any]) -> CropStatistics | None:
    """The statistics of the training crops; None in checkpoints that were imported without them."""
    values = checkpoint["crop_statistics"]
    return None if values is None else from_dict(CropStatistics, values)


def for_deployment(state: dict[str, Any]) -> dict[str, Any]:
    """`state` without what only a resumed run needs."""
    rest = dict.fromkeys(("ema", "optimizer", "scheduler", "scaler", "rng", "progress"))
    return state | rest | {"model": deployed_weights(state)}


def deployed_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The weights averaged over the steps if the run has them, else those after the last step."""
    if state["ema"] is None:
        return state["model"]
    return state["ema"]["model"]
