"""Hard-Mix followed by global max pooling, as one op: a mixed map that is only pooled need never be written.

`pmm::hard_mix_max_pool` also returns where each maximum lies; `pmm::hard_mix_unpool` (its transpose: one value per
sample and channel goes back to the cell it came from) and `pmm::hard_mix_gather` are each other's derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.ops._library import (
    accumulator,
    check_cells,
    check_device,
    check_features,
    check_no_tangent,
    check_partner,
    check_partner_range,
    check_range,
    define,
    dense,
    differentiable,
    format_of,
    memory_format,
)
from pmm.ops.block_ranking import check_mix, rank_on, replaced_cells
from pmm.ops.hard_mix import select


def hard_mix_max_pool(
    x: Tensor,
    cam: Tensor,
    partner: Tensor,
    block: Sequence[int] = (3, 2),
    k: int = 3,
    *,
    on_empty: str = "skip",
) -> tuple[Tensor, Tensor]:
    """The global maximum of each channel of the mixed map.

    Args and errors: as `pmm.ops.hard_mix`; additionally ValueError for a map without cells.

    Returns:
        pooled [N, C] in x's dtype (ties and NaN as in torch's max pool) and replaced [N, H, W] bool.

    Equivalent to: `mixed, replaced = hard_mix(...); F.adaptive_max_pool2d(mixed, 1).flatten(1), replaced`.
    """
    check_no_tangent("hard_mix_max_pool", x)
    pooled, replaced, _ = _hard_mix_max_pool(x, cam.detach(), partner, list(block), k, on_empty)
    return pooled, replaced


def _check(x: Tensor, cam: Tensor, partner: Tensor, block: list[int], k: int, on_empty: str) -> None:
    check_mix("hard_mix_max_pool", x, cam, partner, block, k, on_empty)
    if x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"hard_mix_max_pool: x is {list(x.shape)}; a map to pool must have at least one cell")


def _reference(
    x: Tensor, cam: Tensor, partner: Tensor, block: list[int], k: int, on_empty: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, cam, partner, block, k, on_empty)
    check_partner_range("hard_mix_max_pool", partner)
    replaced = replaced_cells(cam, block, k, on_empty)
    if x.shape[0] * x.shape[1] == 0:
        return x.new_empty(x.shape[:2]), replaced, partner.new_empty(x.shape[:2])
    pooled, cell = F.adaptive_max_pool2d(select(x, replaced, partner), 1, return_indices=True)
    return pooled.flatten(1).contiguous(), replaced, cell.flatten(1).contiguous()


def _fake(
    x: Tensor, cam: Tensor, partner: Tensor, block: list[int], k: int, on_empty: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, cam, partner, block, k, on_empty)
    replaced = torch.empty_like(cam, dtype=torch.bool, memory_format=torch.contiguous_format)
    return x.new_empty(x.shape[:2]), replaced, partner.new_empty(x.shape[:2])


def _compiled(
    kernels: Any, x: Tensor, cam: Tensor, partner: Tensor, block: list[int], k: int, on_empty: str
) -> tuple[Tensor, Tensor, Tensor]:
    pooled, replaced, cell = _fake(x, cam, partner, block, k, on_empty)
    check_partner_range("hard_mix_max_pool", partner)
    rank_on(kernels, cam, block, k, on_empty, replaced)
    kernels.max_pool(dense(x), replaced, partner.contiguous(), pooled, cell)
    return pooled, replaced, cell


def _source(cell: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    """The sample [N, C] that each maximum was read from."""
    itself = torch.arange(len(partner), device=partner.device)[:, None]
    return torch.where(replaced.flatten(1).gather(1, cell), partner[:, None], itself)


def _check_read(name: str, maps: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor) -> None:
    """The contract of both transposes; `maps` has the shape of the map that was pooled. Raises ValueError."""
    check_features(name, maps)
    check_cells(name, "replaced", replaced, maps, (torch.bool,))
    check_partner(name, partner, maps)
    if cell.dtype != torch.int64 or cell.shape != maps.shape[:2]:
        raise ValueError(
            f"{name}: cell is {cell.dtype} {list(cell.shape)}; it must be torch.int64 {list(maps.shape[:2])}"
        )
    check_device(name, maps=maps, cell=cell)


def _check_unpool(dy: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor) -> None:
    if dy.dim() != 2 or replaced.dim() != 3:
        raise ValueError(
            f"hard_mix_unpool: dy is {list(dy.shape)} and replaced {list(replaced.shape)}; "
            "they must be [N, C] and [N, H, W]"
        )
    maps = dy[:, :, None, None].expand(-1, -1, *replaced.shape[1:])
    _check_read("hard_mix_unpool", maps, cell, replaced, partner)


def _check_indices(name: str, cell: Tensor, replaced: Tensor, partner: Tensor) -> None:
    check_range(name, "cell", cell, replaced.shape[1] * replaced.shape[2])
    check_partner_range(name, partner)


def _unpool_reference(dy: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor, channels_last: bool) -> Tensor:
    """dy [N, C] -> dx [N, C, H, W]: each value added to the cell of the sample its maximum was read from."""
    _check_unpool(dy, cell, replaced, partner)
    _check_indices("hard_mix_unpool", cell, replaced, partner)
    (n, c), (_, h, w) = dy.shape, replaced.shape
    wide = dy.to(accumulator(dy.dtype))
    place = (torch.arange(n * c, device=dy.device).view(n, c) * (h * w) + cell).flatten()
    taken = replaced.flatten(1).gather(1, cell)
    away = (partner[:, None] * c + torch.arange(c, device=dy.device)) * (h * w) + cell
    # a sample's own values first, then those taken from it in ascending order; on a vector torch adds one by one
    dx = torch.zeros(n * c * h * w, dtype=wide.dtype, device=dy.device)
    dx[place] = torch.where(taken, 0, wide).flatten()
    dx.index_add_(0, torch.where(taken, away, place.view(n, c)).flatten(), torch.where(taken, wide, 0).flatten())
    return dx.to(dy.dtype).view(n, c, h, w).contiguous(memory_format=memory_format(channels_last))


def _unpool_fake(dy: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor, channels_last: bool) -> Tensor:
    _check_unpool(dy, cell, replaced, partner)
    shape = (*dy.shape, *replaced.shape[1:])
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format(channels_last))


def _unpool_compiled(
    kernels: Any, dy: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor, channels_last: bool
) -> Tensor:
    dx = _unpool_fake(dy, cell, replaced, partner, channels_last)
    _check_indices("hard_mix_unpool", cell, replaced, partner)
    kernels.unpool(dy.contiguous(), cell.contiguous(), replaced.contiguous(), partner.contiguous(), dx)
    return dx


def _gather_reference(g: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    """g [N, C, H, W] -> [N, C]: the values at the cells the maxima were read from."""
    _check_read("hard_mix_gather", g, cell, replaced, partner)
    _check_indices("hard_mix_gather", cell, replaced, partner)
    channel = torch.arange(g.shape[1], device=g.device).expand(g.shape[:2])
    return g.flatten(2)[_source(cell, replaced, partner), channel, cell]


def _gather_fake(g: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    _check_read("hard_mix_gather", g, cell, replaced, partner)
    return g.new_empty(g.shape[:2])


_hard_mix_max_pool = define(
    "hard_mix_max_pool(Tensor x, Tensor cam, Tensor partner, int[] block, int k, str on_empty)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    compiled=_compiled,
)
_unpool = define(
    "hard_mix_unpool(Tensor dy, Tensor cell, Tensor replaced, Tensor partner, bool channels_last) -> Tensor",
    reference=_unpool_reference,
    fake=_unpool_fake,
    compiled=_unpool_compiled,
)
_gather = define(
    "hard_mix_gather(Tensor g, Tensor cell, Tensor replaced, Tensor partner) -> Tensor",
    reference=_gather_reference,
    fake=_gather_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, replaced, cell = output
    ctx.mark_non_differentiable(replaced, cell)
    ctx.save_for_backward(cell, replaced, inputs[2])
    ctx.channels_last = format_of(inputs[0]) == torch.channels_last


def _backward(ctx: Any, dy: Tensor, _replaced: None, _cell: None) -> tuple[Tensor | None, ...]:
    return _unpool(dy, *ctx.saved_tensors, ctx.channels_last), None, None, None, None, None


def _save_unpool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.channels_last = format_of(inputs[0]) == torch.channels_last


differentiable(_hard_mix_max_pool, _backward, _save)
differentiable(_unpool, lambda ctx, dx: (_gather(dx, *ctx.saved_tensors), *[None] * 4), _save_unpool)
differentiable(_gather, lambda ctx, dy: (_unpool(dy, *ctx.saved_tensors, ctx.channels_last), *[None] * 3), _save_gather)
