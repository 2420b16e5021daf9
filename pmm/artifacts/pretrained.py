"""The weights that a backbone starts from: ImageNet's as torchvision publishes them, or those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights

from pmm.artifacts.torch_file import read_torch_file
from pmm.config import ModelConfig
from pmm.models.backbone import Backbone
from pmm.utils.errors import ConflictingOptions, InvalidFile, UserError

EXPECTED = "a ResNet-50 state dict for --weights (or imagenet or none)"


def load_weights(backbone: Backbone, config: ModelConfig) -> None:
    """Start `backbone` from `config.weights`: none, imagenet or a file with a torchvision ResNet-50 state dict.

    Raises InvalidFile for weights that do not fit the backbone key for key (a classifier `fc.*` is ignored),
    ConflictingOptions for a backbone without such weights, UserError if the download fails.
    """
    if config.weights == "none":
        return
    if config.backbone != "resnet50":
        raise ConflictingOptions(
            f"--weights {config.weights}: the {config.backbone} backbone has no such weights",
            "--weights",
            hint="use --weights none",
        )
    state = _imagenet() if config.weights == "imagenet" else read_torch_file(config.weights, EXPECTED)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InvalidFile("not a state dict (a dict of tensors by name)", path=config.weights, expected=EXPECTED)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    renamed = {key if key.startswith("layer4.") else f"trunk.{key}": value for key, value in state.items()}
    expected = backbone.state_dict()
    missing = sorted(set(expected) - set(renamed))
    extra = sorted(set(renamed) - set(expected))
    shapes = sorted(key for key in set(expected) & set(renamed) if expected[key].shape != renamed[key].shape)
    if missing or extra or shapes:
        parts = [f"{len(keys)} {what} (as {keys[0]})" for what, keys in
                 (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if keys]  # fmt: skip
        raise InvalidFile(f"{', '.join(parts)} keys", path=config.weights, expected=EXPECTED)
    backbone.load_state_dict(renamed)


def _imagenet() -> Any:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V1.url).name
    if cached.is_file():  # which torch would not look at closely
        try:
            return read_torch_file(cached, "ImageNet's weights (--weights imagenet)")
        except InvalidFile as error:
            error.hint = "remove that file to download it again"
            raise
    try:
        return ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # includes urllib's errors; RuntimeError: what came is something else
        raise UserError(
            f"--weights imagenet: the download failed ({error})",
            hint="give a file with --weights FILE, or --weights none",
        ) from error
