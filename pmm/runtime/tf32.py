"""TF32: products of fp32 numbers with 10 bits of mantissa, added up in fp32. The GPU decides whether there is such."""

from __future__ import annotations

from pmm.utils.hardware import Gpu

FIRST_CAPABILITY = 8.0
"""Compute capability of the first GPUs that have it (Ampere)."""
TF32_ON = "TF32 on"
"""Among an engine's flags, if it may run fp32 products so."""


def has_tf32(gpu: Gpu) -> bool:
    """Where not, libraries that are allowed TF32 compute in fp32, without a word."""
    return float(gpu.compute_capability) >= FIRST_CAPABILITY
