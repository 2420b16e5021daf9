"""Which cells Hard-Mix replaces: block scores of a CAM, their ranks, and the cells of the first k blocks.

A map [N, H, W] with blocks of (bh, bw) cells has R = ceil(H / bh) rows and Q = ceil(W / bw) columns of blocks; ids run
down the columns: cell (h, w) is in block (w // bw) * R + h // bh. Edge blocks hold the cells that exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.ops._library import SCORE_DTYPES, check_cells, check_features, check_partner


def block_scores(cam: Tensor, block: Sequence[int]) -> Tensor:
    """Sum of `cam` [N, H, W] over each block -> [N, B], in cam's dtype.

    The cells of a block are added one after another, row-major, so that every implementation has the same bits.
    """
    n, h, w = cam.shape
    bh, bw = block
    rows, columns = grid(h, w, block)
    cells = F.pad(cam, (0, columns * bw - w, 0, rows * bh - h)).view(n, rows, bh, columns, bw)
    scores = cells[:, :, 0, :, 0]
    for offset in range(1, bh * bw):
        scores = scores + cells[:, :, offset // bw, :, offset % bw]
    return scores.transpose(1, 2).reshape(n, rows * columns)


def block_ranks(scores: Tensor) -> Tensor:
    """Rank of each block [N, B] int64: the number of blocks before it. Higher scores first, ties by id, NaN as -Inf."""
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    one, another = scores[:, :, None], scores[:, None, :]
    ids = torch.arange(scores.shape[1], device=scores.device)
    before = (another > one) | ((another == one) & (ids[None, :] < ids[:, None]))
    return before.sum(2)


def replaced_cells(cam: Tensor, block: Sequence[int], k: int, on_empty: str) -> Tensor:
    """The cells [N, H, W] bool of each sample's k first blocks; none for an empty CAM with `on_empty="skip"`."""
    _, h, w = cam.shape
    block = bh, bw = clamped(block, h, w)
    rows, _ = grid(h, w, block)
    selected = block_ranks(block_scores(cam, block)) < k
    if on_empty == "skip":
        selected = selected & (cam > 0).flatten(1).any(1, keepdim=True)
    row = torch.arange(h, device=cam.device) // bh
    column = torch.arange(w, device=cam.device) // bw
    return selected[:, column[None, :] * rows + row[:, None]]


def clamped(block: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """The block, no larger than the map: a larger one has the same cells."""
    return max(1, min(block[0], height)), max(1, min(block[1], width))


def grid(height: int, width: int, block: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of blocks on a map."""
    return -(-height // block[0]), -(-width // block[1])


def rank_on(kernels: Any, cam: Tensor, block: Sequence[int], k: int, on_empty: str, replaced: Tensor) -> None:
    """`replaced_cells` by a compiled kernel, into `replaced`."""
    bh, bw = clamped(block, *cam.shape[1:])
    kernels.rank_blocks(cam.contiguous(), bh, bw, k, on_empty == "skip", replaced)


def check_mix(name: str, x: Tensor, cam: Tensor, partner: Tensor, block: Sequence[int], k: int, on_empty: str) -> None:
    """The contract that `hard_mix` and `hard_mix_max_pool` share; reference and fake call it. Raises ValueError."""
    check_features(name, x)
    check_cells(name, "cam", cam, x, SCORE_DTYPES)
    check_partner(name, partner, x)
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"{name}: block is {tuple(block)}; it must be two positive numbers, height and width")
    rows, columns = grid(x.shape[2], x.shape[3], block)
    if not 0 <= k <= rows * columns:
        raise ValueError(
            f"{name}: k is {k}; a {x.shape[2]}x{x.shape[3]} map in {block[0]}x{block[1]} blocks has "
            f"{rows} x {columns} blocks, so k must be in [0, {rows * columns}]"
        )
    if on_empty not in ("skip", "first"):
        raise ValueError(f"{name}: on_empty is '{on_empty}'; it must be 'skip' or 'first'")
