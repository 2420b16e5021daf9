"""The class activation map of a map, and that of a mixed map from the map it was mixed from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmm.ops._library import (
    FEATURE_DTYPES,
    accumulator,
    check_cells,
    check_device,
    check_features,
    check_partner,
    check_partner_range,
    define,
    dense,
)
from pmm.ops.hard_mix import select

BLOCK = 256
"""Channels that are summed at once: on some processors (seen: AMD's, by MKL) torch adds one term after another, and the
rounding of thousands of channels adds up."""


def cam(x: Tensor, weights: Tensor) -> Tensor:
    """The class activation map ReLU(sum_c weights[n, c] * x[n, c, h, w]).

    Args:
        x: maps [N, C, H, W].
        weights: weight of each channel [N, C] (Grad-CAM's alpha).

    Returns:
        [N, H, W], float32 (float64 for float64), without a gradient.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    return _cam(x.detach(), weights.detach())


def mixed_cam(x: Tensor, partner: Tensor, replaced: Tensor, weights: Tensor) -> Tensor:
    """The CAM of the map that `hard_mix` makes of x, without needing that map.

    Args:
        x: unmixed maps [N, C, H, W].
        partner: index of each sample's partner [N], int64 in [0, N).
        replaced: cells taken from the partner [N, H, W] bool.
        weights: weight of each channel [N, C] (Grad-CAM's alpha).

    Returns:
        [N, H, W], float32 (float64 for float64), without a gradient.

    Raises:
        ValueError: a wrong shape, dtype or device, or (on CPU) a partner outside [0, N).

    Equivalent to: `cam(torch.where(replaced[:, None], x[partner], x), weights)`.
    """
    return _mixed_cam(x.detach(), partner, replaced, weights.detach())


def _cam_reference(x: Tensor, weights: Tensor) -> Tensor:
    _check_weights("cam", x, weights)
    wide = accumulator(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        pairs = zip(x.to(wide).split(BLOCK, 1), weights.to(wide).split(BLOCK, 1), strict=True)
        sums = [torch.einsum("nchw,nc->nhw", some, theirs) for some, theirs in pairs]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)).relu()


def _cam_fake(x: Tensor, weights: Tensor) -> Tensor:
    _check_weights("cam", x, weights)
    return x.new_empty((x.shape[0], *x.shape[2:]), dtype=accumulator(x.dtype))


def _cam_compiled(kernels: Any, x: Tensor, weights: Tensor) -> Tensor:
    output = _cam_fake(x, weights)
    partner = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    _run(kernels, x, partner, torch.zeros_like(output, dtype=torch.bool), weights, output)
    return output


def _reference(x: Tensor, partner: Tensor, replaced: Tensor, weights: Tensor) -> Tensor:
    _check(x, partner, replaced, weights)
    check_partner_range("mixed_cam", partner)
    return _cam_reference(select(x, replaced, partner), weights)


def _fake(x: Tensor, partner: Tensor, replaced: Tensor, weights: Tensor) -> Tensor:
    _check(x, partner, replaced, weights)
    return x.new_empty(replaced.shape, dtype=accumulator(x.dtype))


def _compiled(kernels: Any, x: Tensor, partner: Tensor, replaced: Tensor, weights: Tensor) -> Tensor:
    output = _fake(x, partner, replaced, weights)
    check_partner_range("mixed_cam", partner)
    _run(kernels, x, partner.contiguous(), replaced.contiguous(), weights, output)
    return output


def _run(kernels: Any, x: Tensor, partner: Tensor, replaced: Tensor, weights: Tensor, output: Tensor) -> None:
    kernels.mixed_cam(dense(x), replaced, partner, weights.to(output.dtype).contiguous(), output)


def _check(x: Tensor, partner: Tensor, replaced: Tensor, weights: Tensor) -> None:
    check_features("mixed_cam", x)
    check_partner("mixed_cam", partner, x)
    check_cells("mixed_cam", "replaced", replaced, x, (torch.bool,))
    _check_weights("mixed_cam", x, weights)


def _check_weights(name: str, x: Tensor, weights: Tensor) -> None:
    check_features(name, x)
    if weights.shape != x.shape[:2] or weights.dtype not in FEATURE_DTYPES:
        raise ValueError(
            f"{name}: weights are {weights.dtype} {list(weights.shape)}; they must be floating {list(x.shape[:2])}"
        )
    check_device(name, x=x, weights=weights)


_cam = define(
    "cam(Tensor x, Tensor weights) -> Tensor", reference=_cam_reference, fake=_cam_fake, compiled=_cam_compiled
)
_mixed_cam = define(
    "mixed_cam(Tensor x, Tensor partner, Tensor replaced, Tensor weights) -> Tensor",
    reference=_reference,
    fake=_fake,
    compiled=_compiled,
)
