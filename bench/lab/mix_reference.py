"""The mix by its definition, sample by sample, and the check of a competitor's result against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lab.mix_report import AUTHORS, OURS
from bench.lab.mix_variants import BLOCK, K
from pmm.ops.block_ranking import block_scores

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PROVED = "forward equal to the bit; gradient equal, rounded as the definition says"
BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, kw_only=True)
class Maps:
    """The size of the maps to mix, without the batch."""

    channels: int = 2048
    height: int = 24
    width: int = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one setting, and the results by definition, computed sample by sample in plain torch."""

    x: Tensor
    cam: Tensor
    partner: Tensor
    replaced: Tensor
    output: Tensor
    """True result: mixed maps or their maxima."""
    dy: tuple[Tensor, Tensor]
    """Gradients of the output: whole numbers, whose sums are exact in any order, and real numbers."""
    dx: tuple[Tensor, Tensor]
    """The true gradients of x for both."""


def make_case(batch: int, dtype: str, layout: str, maps: Maps, device: torch.device) -> Case:
    """A mix: normal x, CAMs whose blocks rank clearly, partners drawn with repetition. The same for the same sizes."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, maps.channels, maps.height, maps.width)
    cam = clear_cams(batch, maps.height, maps.width, generator)
    partner = torch.randint(batch, (batch,), generator=generator)
    replaced = defined_cells(cam).to(device)

    def drawn(values: Tensor) -> Tensor:
        return values.to(getattr(torch, dtype)).to(device).contiguous(memory_format=FORMATS[layout])

    x = drawn(torch.randn(shape, generator=generator))
    dy = (drawn(torch.randint(-4, 5, shape, generator=generator)), drawn(torch.randn(shape, generator=generator)))
    others = partner.tolist()
    return Case(
        x=x.requires_grad_(),
        cam=cam.to(device),
        partner=partner.to(device),
        replaced=replaced,
        output=defined_mix(x.detach(), replaced, others),
        dy=dy,
        dx=(defined_adjoint(dy[0], replaced, others), defined_adjoint(dy[1], replaced, others)),
    )


def pooled_case(mix: Case) -> Case:
    """The same, with the mixed maps pooled by torch's own max pool."""
    values, cells = F.adaptive_max_pool2d(mix.output, 1, return_indices=True)
    others = mix.partner.tolist()

    def gradients(index: int) -> tuple[Tensor, Tensor]:
        dy = mix.dy[index][:, :, 0, 0].contiguous()
        spread = torch.zeros_like(mix.output, memory_format=torch.contiguous_format)
        spread.flatten(2).scatter_(2, cells.flatten(2), dy[:, :, None])
        return dy, defined_adjoint(spread, mix.replaced, others)

    (whole, dx_whole), (real, dx_real) = gradients(0), gradients(1)
    return Case(
        x=mix.x, cam=mix.cam, partner=mix.partner, replaced=mix.replaced, output=values.flatten(1),
        dy=(whole, real), dx=(dx_whole, dx_real),
    )  # fmt: skip


def prove(name: str, output: Tensor, case: Case) -> tuple[str, str]:
    """The fault of `output` or its gradients (empty if there is none), and what was verified."""
    same = torch.equal if name == AUTHORS else same_bits  # 0 * x can be -0
    if output.dtype != case.x.dtype or output.shape != case.output.shape or not same(output, case.output):
        return f"the forward result is not the definition's ({_distance(output, case.output)})", ""
    (dx,) = torch.autograd.grad(output, case.x, case.dy[0], retain_graph=True)
    if not torch.equal(dx, case.dx[0]):
        return f"the gradient is not the definition's ({_distance(dx, case.dx[0])})", ""
    if name != OURS:
        values = "equal but for the sign of zeros" if name == AUTHORS else "equal to the bit"
        return "", f"forward {values}; gradient equal where its sums are exact"
    (dx,) = torch.autograd.grad(output, case.x, case.dy[1], retain_graph=True)
    if not torch.equal(dx, case.dx[1]):
        return f"the gradient is rounded differently from the definition's ({_distance(dx, case.dx[1])})", ""
    return "", PROVED


def defined_cells(cam: Tensor) -> Tensor:
    """The replaced cells [N, H, W] bool, block by block in plain Python from the definition. `cam` on the CPU."""
    n, h, w = cam.shape
    replaced = torch.zeros(n, h, w, dtype=torch.bool)
    corners = [(top, left) for left in range(0, w, BLOCK[1]) for top in range(0, h, BLOCK[0])]
    for sample, values in enumerate(cam.tolist()):
        scores = []
        for top, left in corners:
            cells = [v for row in values[top : top + BLOCK[0]] for v in row[left : left + BLOCK[1]]]
            total = torch.zeros((), dtype=cam.dtype)
            for value in cells:
                total += value
            scores.append(float(total))
        for block in sorted(range(len(corners)), key=lambda b: (-scores[b], b))[:K]:
            top, left = corners[block]
            replaced[sample, top : top + BLOCK[0], left : left + BLOCK[1]] = True
    return replaced


def defined_mix(x: Tensor, replaced: Tensor, partner: Sequence[int]) -> Tensor:
    """The mixed maps, sample by sample."""
    mixed = x.clone()
    for sample, other in enumerate(partner):
        mixed[sample] = torch.where(replaced[sample], x[other], x[sample])
    return mixed


def defined_adjoint(dy: Tensor, replaced: Tensor, partner: Sequence[int]) -> Tensor:
    """The gradient of `defined_mix`: a sample's unreplaced cells, then the cells that others took of it, in order.

    Summed in float32 (float64 for float64) and rounded once.
    """
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dx = torch.zeros_like(dy, dtype=wide)
    for sample, given in enumerate(dy):
        dx[sample] += torch.where(replaced[sample], 0, given.to(wide))
    for sample, other in enumerate(partner):
        dx[other] += torch.where(replaced[sample], dy[sample].to(wide), 0)
    return dx.to(dy.dtype)


def clear_cams(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """CAMs [N, H, W] float32 as after a ReLU, whose k-th and next block lie so far apart that every order of summing
    selects the same blocks."""
    cam = torch.zeros(n, height, width)
    waiting = torch.ones(n, dtype=torch.bool)
    while waiting.any():
        drawn = torch.randn(n, height, width, generator=generator).relu()
        cam[waiting] = drawn[waiting]
        waiting = ~clear(cam)
    return cam


def clear(cam: Tensor) -> Tensor:
    """[N] bool: the k-th and (k+1)-th block scores of a CAM [N, H, W] differ by more than 1e-5 of the largest."""
    scores = block_scores(cam.double(), BLOCK).sort(1, descending=True).values
    return scores[:, K - 1] - scores[:, K] > 1e-5 * scores[:, 0].abs()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with the signs of zeros and the NaNs; `a` and `b` of one dtype."""
    return torch.equal(
        a.detach().contiguous().view(BITS[a.element_size()]), b.contiguous().view(BITS[b.element_size()])
    )


def _distance(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
    difference = (a.detach().double() - b.double()).abs()
    differing = int((difference != 0).sum())
    if not differing:
        return "signs of zeros differ"
    return f"{differing} of {a.numel()} values differ, by {float(difference.max()):.3g} at most"
