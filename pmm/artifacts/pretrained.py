"""The weights that a trunk starts from: ImageNet's as torchvision publishes them, or those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights

from pmm.artifacts.torch_file import read_torch_file
from pmm.config import ModelConfig
from pmm.models.backbone import Backbone
from pmm.utils.errors import UserError


def load_weights(backbone: Backbone, config: ModelConfig) -> None:
    """Start `backbone` from `config.weights`: none, imagenet or a file with a torchvision ResNet-50 state dict.

    Raises UserError if the weights cannot be had, or do not fit the trunk key for key (a classifier `fc.*` is ignored).
    """
    if config.weights == "none":
        return
    if config.backbone != "resnet50":
        raise UserError(
            f"--weights {config.weights}: the {config.backbone} trunk has no such weights; use --weights none"
        )
    state = _imagenet() if config.weights == "imagenet" else _state_dict(config.weights)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"--weights {config.weights}: not a state dict (a dict of tensors by name)")
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    renamed = {key if key.startswith("layer4.") else f"trunk.{key}": value for key, value in state.items()}
    expected = backbone.state_dict()
    missing = sorted(set(expected) - set(renamed))
    extra = sorted(set(renamed) - set(expected))
    shapes = sorted(key for key in set(expected) & set(renamed) if expected[key].shape != renamed[key].shape)
    if missing or extra or shapes:
        parts = [f"{len(keys)} {what} (as {keys[0]})" for what, keys in
                 (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if keys]  # fmt: skip
        raise UserError(f"--weights {config.weights}: not a ResNet-50 state dict: {', '.join(parts)} keys")
    backbone.load_state_dict(renamed)


def _imagenet() -> Any:
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V1.url).name
    if kept.is_file():  # which torch would not look at closely
        try:
            return read_torch_file(kept, "ImageNet's weights")
        except UserError as error:
            raise UserError(f"--weights imagenet: {error}; remove that file to download it anew") from error
    try:
        return ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # includes urllib's errors; RuntimeError: what came is something else
        raise UserError(
            f"--weights imagenet: the download failed ({error}); give a file with --weights FILE, or --weights none"
        ) from error


def _state_dict(path: str) -> Any:
    try:
        return read_torch_file(path, "imagenet, none or a ResNet-50 state dict")
    except UserError as error:
        raise UserError(f"--weights {error}") from error
