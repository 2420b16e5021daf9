"""The `pmm` operator library: one way to declare an op, and the checks that the ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pmm.ops import _extension

_LIBRARY = torch.library.Library("pmm", "DEF")

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCORE_DTYPES = (torch.float32, torch.float64)


def define(
    schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], compiled: Callable[..., Any] | None = None
) -> Any:
    """Declare `pmm::NAME(...)` with its plain-torch reference and its fake; returns the op.

    `compiled(kernels, *arguments)` does the same with the compiled kernels; it is used where they exist for the device
    of the first argument. It lets `fake` check the arguments and allocate the outputs, so that both have one home.
    """
    name = schema.split("(", 1)[0]

    def run(*arguments: Any) -> Any:
        kernels = _extension.kernels(arguments[0].device) if compiled else None
        return reference(*arguments) if kernels is None else compiled(kernels, *arguments)  # type: ignore[misc]

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pmm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.pmm, name).default


def differentiable(op: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Register `backward` for `op`; `setup(ctx, inputs, output)` saves what it needs."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=_LIBRARY)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def format_of(x: Tensor) -> torch.memory_format:
    """channels_last for channels_last input, else contiguous: the layout of every map an op returns."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def memory_format(channels_last: bool) -> torch.memory_format:
    """Of a map that is channels_last or not."""
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x in the layout that its outputs have; a copy only of what is neither contiguous nor channels_last."""
    return x.contiguous(memory_format=format_of(x))


def check_no_tangent(name: str, x: Tensor) -> None:
    """Custom ops have no forward-mode derivative, and torch would silently take it for zero."""
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name}: no forward-mode derivative; use reverse mode (torch.autograd.grad)")


def check_features(name: str, x: Tensor) -> None:
    """x is a floating [N, C, H, W]. Raises ValueError."""
    if x.dim() != 4:
        raise ValueError(f"{name}: x is {list(x.shape)}; it must be [N, C, H, W]")
    if x.dtype not in FEATURE_DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}; it must be one of {_names(FEATURE_DTYPES)}")


def check_partner(name: str, partner: Tensor, x: Tensor) -> None:
    """partner is int64 [N] on the device of x, each entry in [0, N) (checked on CPU). Raises ValueError."""
    if partner.dtype != torch.int64 or partner.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: partner is {partner.dtype} {list(partner.shape)}; it must be torch.int64 [{x.shape[0]}]"
        )
    check_device(name, partner=partner, x=x)


def check_partner_range(name: str, partner: Tensor) -> None:
    """Every partner in [0, N)."""
    check_range(name, "partner", partner, partner.numel())


def check_range(name: str, key: str, indices: Tensor, count: int) -> None:
    """Every index in [0, count). Looks only at CPU tensors: on a GPU it would cost a host synchronisation."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < 0 or high >= count:
            raise ValueError(f"{name}: {key} has values in [{low}, {high}]; they must be in [0, {count})")


def check_device(name: str, **tensors: Tensor) -> None:
    """All on one device. Raises ValueError."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{key} on {tensor.device}" for key, tensor in tensors.items())
        raise ValueError(f"{name}: {devices}; they must be on one device")


def check_cells(name: str, key: str, cells: Tensor, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """A [N, H, W] beside x, of one of `dtypes`, on its device. Raises ValueError."""
    n, _, h, w = x.shape
    if cells.shape != (n, h, w):
        raise ValueError(f"{name}: {key} is {list(cells.shape)}; beside x {list(x.shape)} it must be {[n, h, w]}")
    if cells.dtype not in dtypes:
        raise ValueError(f"{name}: {key} is {cells.dtype}; it must be one of {_names(dtypes)}")
    check_device(name, x=x, **{key: cells})


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
