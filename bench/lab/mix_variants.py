"""The variants of the mix that are compared: the authors' way, good eager torch, compiled, and ours.

A mixer does x [N, C, H, W], cam [N, H, W], partner [N] -> the mixed maps [N, C, H, W]; `pooled` makes it return their
global maxima [N, C]. Blocks, k and what happens to empty CAMs are the paper's. All can be differentiated by x.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lab.mix_report import AUTHORS, COMPILED, EAGER, OURS
from pmm.ops import hard_mix, hard_mix_max_pool
from pmm.ops.block_ranking import replaced_cells
from pmm.presets import preset

_PAPER = preset("paper").model
BLOCK, K, ON_EMPTY = _PAPER.block, _PAPER.k, _PAPER.on_empty

Mixer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, cam, partner) -> mixed [N, C, H, W] or pooled [N, C]."""


def authors_mix(x: Tensor, cam: Tensor, partner: Tensor) -> Tensor:
    """What the authors' public code does, written by us from a description of it; none of the text is theirs.

    Sample by sample on the host: fetch the CAM, add up its blocks, sort them, fetch the corners of each block to
    replace and the partner (2 + 4k = 14 synchronisations per sample: 1,792 at N = 128), and draw the mask and its
    complement, as large as the map, in host memory. Then two copies to the device (2E) and m * x + (1 - m) * x[j], in
    the dtype of x. For finite x that is the select but for the sign of a zero.
    """
    n, _, h, _ = x.shape
    rows = -(-h // BLOCK[0])
    mask = torch.ones_like(x.detach(), device="cpu")  # in the layout of x, which the products then have too
    complement = torch.zeros_like(mask)
    others = []
    for sample in range(n):
        scores = _host_scores(cam[sample].cpu().numpy())
        chosen = torch.as_tensor(np.argsort(-scores, kind="stable")[:K].copy(), device=x.device)
        for block in chosen:
            top, left = (block % rows) * BLOCK[0], (block // rows) * BLOCK[1]
            bottom, right = top + BLOCK[0], left + BLOCK[1]
            cells = (sample, slice(None), slice(int(top), int(bottom)), slice(int(left), int(right)))
            mask[cells], complement[cells] = 0, 1
        others.append(int(partner[sample]))
    return mask.to(x.device) * x + complement.to(x.device) * x[others]


def _host_scores(cam: np.ndarray) -> np.ndarray:
    """Sum of a CAM [H, W] over each block, block after block, ids down the columns."""
    h, w = cam.shape
    corners = [(top, left) for left in range(0, w, BLOCK[1]) for top in range(0, h, BLOCK[0])]
    return np.array([cam[top : top + BLOCK[0], left : left + BLOCK[1]].sum() for top, left in corners])


def eager_mix(x: Tensor, cam: Tensor, partner: Tensor) -> Tensor:
    """Good eager torch: ranks without a loop, then a gather and `torch.where`; with channels_last, where a cell is a
    row, one gather of rows, which is several times faster there.

    `x[partner]`, because on CPUs it is mostly faster than `x.index_select(0, partner)`.
    """
    replaced = replaced_cells(cam, BLOCK, K, ON_EMPTY)
    if not x.is_contiguous(memory_format=torch.channels_last):
        return torch.where(replaced[:, None], x[partner], x)
    n, c, h, w = x.shape
    rows = torch.arange(n * h * w, device=x.device).view(n, h, w)
    source = torch.where(replaced, rows[partner], rows).flatten()
    return x.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, source).view(n, h, w, c).permute(0, 3, 1, 2)


def eager_cam(x: Tensor, weights: Tensor) -> Tensor:
    """`pmm.ops.mixed_cam.cam` in eager torch: x [N, C, H, W], weights [N, C] -> [N, H, W]."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return torch.einsum("nchw,nc->nhw", x.float(), weights.float()).relu()


def fused_mix(x: Tensor, cam: Tensor, partner: Tensor) -> Tensor:
    """`pmm.ops.hard_mix`."""
    return hard_mix(x, cam, partner, BLOCK, K, on_empty=ON_EMPTY)[0]


def fused_pool(x: Tensor, cam: Tensor, partner: Tensor) -> Tensor:
    """`pmm.ops.hard_mix_max_pool`."""
    return hard_mix_max_pool(x, cam, partner, BLOCK, K, on_empty=ON_EMPTY)[0]


def pooled(mix: Mixer) -> Mixer:
    """`mix`, then torch's global max pool."""

    def pool(x: Tensor, cam: Tensor, partner: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(mix(x, cam, partner), 1).flatten(1)

    return pool


def compiled(mix: Mixer) -> Mixer:
    """`mix` through `torch.compile`, after a reset of its cache."""
    import torch._functorch.config

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # they forbid the repeated backward by which it is timed alone
    return torch.compile(mix, fullgraph=True, dynamic=False)


MIX_VARIANTS: dict[str, dict[str, Callable[[], Mixer]]] = {
    "mix": {
        AUTHORS: lambda: authors_mix,
        EAGER: lambda: eager_mix,
        COMPILED: lambda: compiled(eager_mix),
        OURS: lambda: fused_mix,
    },
    "mix+pool": {
        AUTHORS: lambda: pooled(authors_mix),
        EAGER: lambda: pooled(eager_mix),
        COMPILED: lambda: compiled(pooled(eager_mix)),
        OURS: lambda: fused_pool,
    },
}
"""Each operation's competitors, made when called."""
