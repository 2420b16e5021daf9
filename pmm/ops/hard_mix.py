"""Hard-Mix: replace the blocks that a CAM ranks first by the same cells of a partner's map.

`pmm::hard_mix` ranks and selects; `pmm::hard_mix_select` selects with cells already known; `pmm::hard_mix_adjoint` is
its transpose. The last two are each other's derivative, so the op can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmm.ops._library import (
    accumulator,
    check_cells,
    check_features,
    check_no_tangent,
    check_partner,
    check_partner_range,
    define,
    dense,
    differentiable,
    format_of,
    memory_format,
)
from pmm.ops.block_ranking import check_mix, rank_on, replaced_cells


def hard_mix(
    x: Tensor,
    cam: Tensor,
    partner: Tensor,
    block: Sequence[int] = (3, 2),
    k: int = 3,
    *,
    on_empty: str = "skip",
) -> tuple[Tensor, Tensor]:
    """Mix each map with its partner's in the k blocks where the CAM is largest.

    Args:
        x: maps [N, C, H, W], float16, bfloat16, float32 or float64, any layout.
        cam: scores [N, H, W], float32 or float64; carries no gradient.
        partner: index of each sample's partner [N], int64 in [0, N).
        block: height and width of a block in cells; edge blocks may be smaller.
        k: blocks replaced per sample, 0 to the number of blocks.
        on_empty: samples whose CAM has no positive cell keep their map ("skip") or lose the blocks the ranking
            gives ("first").

    Returns:
        mixed [N, C, H, W] = x[partner] where replaced, else x (a select: bit-exact in every dtype), and
        replaced [N, H, W] bool.

    Raises:
        ValueError: a wrong shape, dtype, device, block, k or on_empty, or (on CPU) a partner outside [0, N).

    Equivalent to: `torch.where(replaced[:, None], x[partner], x)`.
    """
    check_no_tangent("hard_mix", x)
    return _hard_mix(x, cam.detach(), partner, list(block), k, on_empty)


def hard_mix_select(x: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    """Mix each map with its partner's in cells that are known already.

    Args:
        x: maps [N, C, H, W], as in `hard_mix`.
        replaced: the cells to take from the partner [N, H, W] bool.
        partner: index of each sample's partner [N], int64 in [0, N).

    Returns:
        [N, C, H, W] = x[partner] where replaced, else x.

    Raises:
        ValueError: a wrong shape, dtype or device, or (on CPU) a partner outside [0, N).

    Equivalent to: `torch.where(replaced[:, None], x[partner], x)`.
    """
    check_no_tangent("hard_mix_select", x)
    return _select(x, replaced, partner)


def select(x: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    """Reference select [N, C, H, W] in the layout of x."""
    mixed = torch.where(replaced[:, None], x.index_select(0, partner), x)
    return mixed.contiguous(memory_format=format_of(x))


def _reference(
    x: Tensor, cam: Tensor, partner: Tensor, block: list[int], k: int, on_empty: str
) -> tuple[Tensor, Tensor]:
    check_mix("hard_mix", x, cam, partner, block, k, on_empty)
    check_partner_range("hard_mix", partner)
    replaced = replaced_cells(cam, block, k, on_empty)
    return select(x, replaced, partner), replaced


def _fake(x: Tensor, cam: Tensor, partner: Tensor, block: list[int], k: int, on_empty: str) -> tuple[Tensor, Tensor]:
    check_mix("hard_mix", x, cam, partner, block, k, on_empty)
    return torch.empty_like(x, memory_format=format_of(x)), torch.empty_like(
        cam, dtype=torch.bool, memory_format=torch.contiguous_format
    )


def _compiled(
    kernels: Any, x: Tensor, cam: Tensor, partner: Tensor, block: list[int], k: int, on_empty: str
) -> tuple[Tensor, Tensor]:
    mixed, replaced = _fake(x, cam, partner, block, k, on_empty)
    check_partner_range("hard_mix", partner)
    rank_on(kernels, cam, block, k, on_empty, replaced)
    kernels.select(dense(x), replaced, partner.contiguous(), mixed)
    return mixed, replaced


def _select_reference(x: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    _check_select("hard_mix_select", x, replaced, partner)
    check_partner_range("hard_mix_select", partner)
    return select(x, replaced, partner)


def _adjoint_reference(dy: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    """dx[n] = dy[n] off its replaced cells + the replaced cells of every sample with partner n, in ascending order."""
    _check_select("hard_mix_adjoint", dy, replaced, partner)
    check_partner_range("hard_mix_adjoint", partner)
    wide = dy.to(accumulator(dy.dtype))
    mask = replaced[:, None]
    dx = torch.where(mask, 0, wide).index_add_(0, partner, torch.where(mask, wide, 0))
    return dx.to(dy.dtype).contiguous(memory_format=format_of(dy))


def _like_first(name: str) -> Any:
    def fake(x: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
        _check_select(name, x, replaced, partner)
        return torch.empty_like(x, memory_format=format_of(x))

    return fake


def _with_cells(name: str, kernel: str) -> Any:
    """The compiled form of both ops on known cells."""
    fake = _like_first(name)

    def compiled(kernels: Any, x: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
        output = fake(x, replaced, partner)
        check_partner_range(name, partner)
        getattr(kernels, kernel)(dense(x), replaced.contiguous(), partner.contiguous(), output)
        return output

    return compiled


def _check_select(name: str, x: Tensor, replaced: Tensor, partner: Tensor) -> None:
    check_features(name, x)
    check_cells(name, "replaced", replaced, x, (torch.bool,))
    check_partner(name, partner, x)


_hard_mix = define(
    "hard_mix(Tensor x, Tensor cam, Tensor partner, int[] block, int k, str on_empty) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    compiled=_compiled,
)
_select = define(
    "hard_mix_select(Tensor x, Tensor replaced, Tensor partner) -> Tensor",
    reference=_select_reference,
    fake=_like_first("hard_mix_select"),
    compiled=_with_cells("hard_mix_select", "select"),
)
_adjoint = define(
    "hard_mix_adjoint(Tensor dy, Tensor replaced, Tensor partner) -> Tensor",
    reference=_adjoint_reference,
    fake=_like_first("hard_mix_adjoint"),
    compiled=_with_cells("hard_mix_adjoint", "adjoint"),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[2])
    ctx.channels_last = format_of(inputs[0]) == torch.channels_last


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.channels_last = format_of(inputs[0]) == torch.channels_last


def _transposed(op: Any, ctx: Any, gradient: Tensor) -> Tensor:
    """`op` of a gradient in the layout of the input (that of a sum, say, is expanded and has none)."""
    return op(gradient.contiguous(memory_format=memory_format(ctx.channels_last)), *ctx.saved_tensors)


differentiable(_hard_mix, lambda ctx, dy, _: (_transposed(_adjoint, ctx, dy), *[None] * 5), _save)
differentiable(_select, lambda ctx, dy: (_transposed(_adjoint, ctx, dy), None, None), _save_inputs)
differentiable(_adjoint, lambda ctx, dx: (_transposed(_select, ctx, dx), None, None), _save_inputs)
