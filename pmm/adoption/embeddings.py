"""The user's network as one that maps RGB images to embeddings: an output is chosen, BGR and the norm are its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmm.adoption.user_code import CannotAdopt
from pmm.utils.errors import InvalidValue


def outputs_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in what a network returns: `features` of a dict or a dataclass, `1` of a tuple, `1.features` of both;
    a tensor alone has no name."""
    if isinstance(value, Tensor):
        return {name: value}
    parts: dict[str, Any] = {}
    if isinstance(value, Mapping):
        parts = {str(key): each for key, each in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = dict(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        parts = {str(at): each for at, each in enumerate(value)}
    found: dict[str, Tensor] = {}
    for key, each in parts.items():
        found |= outputs_of(each, f"{name}.{key}" if name else key)
    return found


def choose_output(value: Any, output: str) -> str:
    """The name of the output to take of what a network returned for some images.

    Raises CannotAdopt if there is none, or if there are several and `output` is empty; InvalidValue if it is no name.
    """
    found = outputs_of(value)
    if not found:
        raise CannotAdopt(f"it returns no tensor but {type(value).__name__}", expected="embeddings [N, D]")
    shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(found.items())[:12])
    if output and output not in found:
        raise InvalidValue("--output", output, f"one of its outputs: {shown}" if "" not in found else "no --output")
    if not output and len(found) > 1:
        raise CannotAdopt(f"it has {len(found)} outputs: {shown}", hint="choose the embeddings with --output")
    return output or next(iter(found))


class EmbeddingNetwork(nn.Module):
    """normalised RGB images [N, 3, H, W] -> embeddings float32 [N, D] of the user's network."""

    def __init__(self, module: nn.Module, output: str, *, bgr: bool, normalise: bool) -> None:
        super().__init__()
        self.module, self.output, self.bgr, self.normalise = module, output, bgr, normalise

    def forward(self, images: Tensor) -> Tensor:
        embeddings = outputs_of(self.module(images.flip(1) if self.bgr else images))[self.output]
        if embeddings.dim() == 4 and embeddings.shape[2:] == (1, 1):
            embeddings = embeddings.flatten(1)
        if embeddings.dtype != torch.float32:
            embeddings = embeddings.float()
        return F.normalize(embeddings) if self.normalise else embeddings


def check_shape(embeddings: Tensor, images: int) -> None:
    """Raises CannotAdopt unless `embeddings`, of so many images, are numbers [N, D]."""
    shape = list(embeddings.shape)
    pooled = embeddings.dim() == 2 or (embeddings.dim() == 4 and shape[2:] == [1, 1])
    if not pooled or shape[0] != images or not embeddings.is_floating_point():
        dtype = str(embeddings.dtype).removeprefix("torch.")
        hint = "choose another with --output, or let the factory return a network that pools it"
        raise CannotAdopt(
            f"its output for {images} images is {dtype} {shape}", expected=f"floating point [{images}, D]", hint=hint
        )
