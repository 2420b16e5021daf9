"""The precision that steps compute in: what `--amp auto` means on a device, and what a device only emulates."""

from __future__ import annotations

import dataclasses

import torch

from pmm.config import Config
from pmm.utils.errors import BackendUnavailable
from pmm.utils.hardware import cpu_has_bf16

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CAPABILITY, FP16_CAPABILITY = (8, 0), (7, 0)
"""Compute capability from which on GPUs multiply in bf16, and in fp16 faster than in fp32."""


def with_resolved_amp(config: Config, device: torch.device) -> Config:
    """`config` with the precision that "auto" means on `device`.

    Raises BackendUnavailable for bf16 on a device that emulates it, several times slower than fp32.
    """
    amp: str = config.recipe.amp
    if amp == "auto":
        amp = _fastest(device)
    elif amp == "bf16" and not _has_bf16(device):
        problem = f"--amp bf16: {_name(device)} does not compute in bf16, it would be emulated, slower than fp32"
        raise BackendUnavailable(problem, hint="use --amp auto")
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, amp=amp))  # type: ignore[arg-type]


def _fastest(device: torch.device) -> str:
    if _has_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP16_CAPABILITY else "off"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return cpu_has_bf16()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
