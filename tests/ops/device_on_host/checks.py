"""What the emulated kernels must compute. tests/slow/test_device_code.py runs this file under the sanitizers.

What is marked `full` runs when there is time; the rest for each change.
Every kernel runs in several orders of its threads and blocks, into memory full of garbage; all must give the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmm.ops.block_ranking import replaced_cells
from tests.ops.emulated import GARBAGE, Emulated
from tests.ops.reference import adjoint_by_hand, mixed_by_hand

KERNELS = Emulated(os.environ["PMM_TEST_KERNELS"])
SCHEDULES = (0, 1, 2)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
SHAPES = {
    "paper": (3, 64, 24, 8),
    "cells in vectors": (5, 24, 4, 4),
    "channels in vectors": (4, 40, 7, 5),
    "nothing in vectors": (3, 7, 5, 4),
    "one sample": (1, 9, 3, 3),
    "one cell": (3, 16, 1, 1),
    "one row": (2, 3, 1, 9),
    "one column": (3, 8, 6, 1),
    "one channel": (4, 1, 4, 8),
    "many channels": (2, 520, 2, 3),
    "many cells": (2, 8, 33, 64),
    "no sample": (0, 3, 4, 4),
    "no channel": (2, 0, 4, 4),
}
PARTNERS: dict[str, Callable[[int], Tensor]] = {
    "next": lambda n: torch.arange(n).roll(1),
    "itself": torch.arange,
    "any": lambda n: torch.randint(max(n, 1), (n,)),
    "all one": lambda n: torch.full((n,), n // 2),
}


def _maps():
    """Every dtype with every shape in both layouts, each with two kinds of partners.

    A quarter is not `full`: every dtype with every shape once, while layouts, addresses and partners take turns.
    """
    for d, dtype in enumerate(DTYPES):
        for s, (name, shape) in enumerate(SHAPES.items()):
            turn = ((d + s // 2) % 2 == 1 and name != "many cells", s % 2)  # those take seconds with channels_last
            for last in (False, True):
                for other, aligned in enumerate((True, s % 3 > 0)):
                    kind = list(PARTNERS)[(d + s + 2 * other) % 4]
                    marks = () if (last, other) == turn else pytest.mark.full
                    identity = f"{dtype}-{'NHWC' if last else 'NCHW'}-{kind}-{name}"
                    yield pytest.param(dtype, last, aligned, kind, shape, id=identity, marks=marks)


MAPS = pytest.mark.parametrize(("dtype", "channels_last", "aligned", "partners", "shape"), list(_maps()))
RANKINGS = [
    pytest.param(shape, block, dtype, marks=pytest.mark.full if (s + b + d) % 2 else ())
    for s, shape in enumerate([(3, 24, 8), (2, 7, 5), (1, 1, 1), (2, 1, 9), (2, 20, 17), (0, 4, 4), (2, 0, 3)])
    for b, block in enumerate([(3, 2), (1, 1), (2, 3), (100, 1), (50, 70)])
    for d, dtype in enumerate([torch.float32, torch.float64])
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


def placed(values: Tensor, channels_last: bool, aligned: bool) -> Tensor:
    """The same maps in the layout; unaligned: one element behind an address of 16 bytes."""
    order, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if channels_last else ((0, 1, 2, 3), (0, 1, 2, 3))
    memory = values.permute(order).contiguous()
    if not aligned:
        memory = torch.cat([memory.new_zeros(1), memory.flatten()])[1:].view(memory.shape)
        assert memory.numel() == 0 or memory.data_ptr() % 16
    return memory.permute(back)


def problem(shape, dtype, channels_last, aligned, partners):
    n, c, h, w = shape
    x = placed(torch.randn(n, c, h, w, dtype=torch.float64).to(dtype), channels_last, aligned)
    return x, torch.rand(n, h, w) < torch.rand(n, 1, 1) ** 2, PARTNERS[partners](n)


def special(x: Tensor) -> Tensor:
    """x in place, with few distinct values, signed zeros, infinities and NaN; some planes of -Inf alone."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")])
    kinds = torch.randint(1, len(values) + 1, (*x.shape[:2], 1, 1))
    drawn = values[(torch.rand(x.shape) * kinds).long()]
    return x.copy_(torch.where(torch.rand(*x.shape[:2], 1, 1) < 0.1, float("-inf"), drawn))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def run(kernel: Callable[..., None], *arguments: object, into: Tensor | tuple[Tensor, ...]) -> None:
    """Call the kernel on every schedule; outputs get all their bytes anew, and always the same."""
    outputs = into if isinstance(into, tuple) else (into,)
    first: list[Tensor] = []
    for seed in SCHEDULES:
        for output in outputs:
            torch.empty(0, dtype=torch.uint8).set_(output.untyped_storage()).fill_(GARBAGE)
        KERNELS.schedule(seed)
        kernel(*arguments, *outputs)
        found = [bits(output).clone() for output in outputs]
        first = first or found
        assert all(map(torch.equal, first, found)), f"schedule {seed} differs"


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_each_change_meets_every_dtype_in_both_layouts_as_vectors_and_not():
    kinds, partners = set(), set()
    for case in _maps():
        dtype, last, aligned, kind, (n, c, h, w) = case.values
        if not case.marks and n * c:
            vectors = aligned and (c if last else h * w) % (16 // dtype.itemsize) == 0
            kinds.add((dtype, last, vectors))
            partners.add((kind, last, vectors))
    assert len(kinds) == len(partners) == 4 * 2 * 2


@pytest.mark.parametrize(("shape", "block", "dtype"), RANKINGS)
def test_rank_blocks(shape, block, dtype):
    _, h, w = shape
    blocks = -(-h // block[0]) * -(-w // block[1])
    values = torch.tensor([0.0, 0.0, 0.25, 0.5, 1.0, -1.0, float("nan"), float("inf"), float("-inf")], dtype=dtype)
    cams = [torch.randn(shape, dtype=dtype).relu(), torch.zeros(shape, dtype=dtype)]
    cams += [torch.randn(shape, dtype=dtype) * 1e-9]  # nothing of which is left beside 1
    cams += [values[torch.randint(high, shape)] for high in (3, 5, 9)]
    for cam in cams:
        for k in {0, min(3, blocks), blocks // 2, blocks}:
            for skip_empty in (False, True):
                replaced = torch.empty(shape, dtype=torch.bool)
                run(KERNELS.rank_blocks, cam, *block, k, skip_empty, into=replaced)
                assert torch.equal(replaced, replaced_cells(cam, block, k, "skip" if skip_empty else "first"))


def test_rank_blocks_adds_the_cells_row_major():
    """In any other order, the first block would have a score of 1."""
    cam = torch.tensor([[[1e8, 1.0, 0.5, 0.0], [-1e8, 0.0, 0.0, 0.0]]])
    replaced = torch.empty(1, 2, 4, dtype=torch.bool)
    run(KERNELS.rank_blocks, cam, 2, 2, 1, True, into=replaced)
    assert replaced[0].tolist() == [[False, False, True, True]] * 2


@MAPS
def test_select_moves_the_bits(dtype, channels_last, aligned, partners, shape):
    x, replaced, partner = problem(shape, dtype, channels_last, aligned, partners)
    raw = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    raw.copy_(torch.randint(256, raw.shape))  # any bits at all, NaN of every kind
    y = placed(torch.zeros_like(x), channels_last, aligned)
    run(KERNELS.select, x, replaced, partner, into=y)
    expected = mixed_by_hand(x.contiguous().view(BITS[x.element_size()]), replaced, partner)
    assert torch.equal(bits(y), expected)


@MAPS
def test_adjoint_rounds_once(dtype, channels_last, aligned, partners, shape):
    dy, replaced, partner = problem(shape, dtype, channels_last, aligned, partners)
    dx = placed(torch.zeros_like(dy), channels_last, aligned)
    run(KERNELS.adjoint, dy, replaced, partner, into=dx)
    same(dx, adjoint_by_hand(dy, replaced, partner))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shifted", ["given", "cells", "result"])
def test_vectors_need_each_address_to_be_aligned(shifted, channels_last):
    given, replaced, partner = problem((3, 16, 4, 4), torch.float32, channels_last, shifted != "given", "next")
    result = placed(torch.zeros_like(given), channels_last, shifted != "result")
    replaced = placed(replaced[:, None], False, shifted != "cells")[:, 0]
    run(KERNELS.select, given, replaced, partner, into=result)
    same(result, mixed_by_hand(given, replaced, partner))
    run(KERNELS.adjoint, given, replaced, partner, into=result)
    same(result, adjoint_by_hand(given, replaced, partner))
    weights, cam = torch.rand(1 + 3 * 16)[1:].view(3, 16), torch.empty(replaced.shape)
    run(KERNELS.mixed_cam, given, replaced, partner, weights, into=cam)
    expected = terms(given, replaced, partner, weights).sum(1).relu()
    torch.testing.assert_close(cam.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_adjoint_of_no_and_of_all_cells_and_of_special_values(channels_last):
    dy, replaced, partner = problem((4, 8, 4, 4), torch.float16, channels_last, True, "all one")
    for cells in (torch.zeros_like(replaced), torch.ones_like(replaced), replaced):
        dx = torch.empty_like(dy)
        run(KERNELS.adjoint, special(dy), cells, partner, into=dx)
        same(dx, adjoint_by_hand(dy, cells, partner))


@pytest.mark.parametrize("values", ["distinct", "special"])
@MAPS
def test_max_pool(dtype, channels_last, aligned, partners, shape, values):
    x, replaced, partner = problem(shape, dtype, channels_last, aligned, partners)
    if values == "special":
        special(x)
    n, c, _, _ = shape
    pooled, cell = torch.empty(n, c, dtype=dtype), torch.empty(n, c, dtype=torch.int64)
    run(KERNELS.max_pool, x, replaced, partner, into=(pooled, cell))
    if n * c == 0:
        return
    mixed = mixed_by_hand(x, replaced, partner).contiguous()
    expected, index = F.adaptive_max_pool2d(mixed, 1, return_indices=True)
    assert torch.equal(cell, index.flatten(1))
    same(pooled, expected.flatten(1))
    taken = mixed.flatten(2).gather(2, cell[:, :, None])[:, :, 0]
    assert torch.equal(bits(pooled)[~taken.isnan()], bits(taken)[~taken.isnan()])  # signed zeros, too


def unpool_by_hand(dy: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor) -> Tensor:
    """Plane by plane of single additions: each sample's own maxima, then those taken from it, ascending."""
    (n, c), (_, h, w) = dy.shape, replaced.shape
    dx = torch.zeros(n, c, h * w, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32)
    taken = replaced.flatten(1).gather(1, cell)
    for wanted in (False, True):
        for s in range(n):
            channels = (taken[s] == wanted).nonzero()[:, 0]
            dx[partner[s] if wanted else s, channels, cell[s, channels]] += dy[s, channels].to(dx.dtype)
    return dx.to(dy.dtype).view(n, c, h, w)


@pytest.mark.parametrize("spread", [1.0, 0.02], ids=["anywhere", "often the same cell"])
@MAPS
def test_unpool(dtype, channels_last, aligned, partners, shape, spread):
    dx, replaced, partner = problem(shape, dtype, channels_last, aligned, partners)
    n, c, h, w = shape
    dy, cell = torch.randn(n, c, dtype=torch.float64).to(dtype), (torch.rand(n, c) * h * w * spread).long()
    run(KERNELS.unpool, dy, cell, replaced, partner, into=dx)
    assert torch.equal(dx, unpool_by_hand(dy, cell, replaced, partner))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpool_adds_what_meets_in_a_cell_in_order_and_rounds_once(dtype, channels_last):
    dx, replaced, partner = problem((12, 40, 2, 3), dtype, channels_last, True, "all one")
    dy, cell = torch.randn(12, 40, dtype=torch.float64).exp().to(dtype), torch.zeros(12, 40, dtype=torch.int64)
    replaced[::2] = True
    run(KERNELS.unpool, dy, cell, replaced, partner, into=dx)
    expected = unpool_by_hand(dy, cell, replaced, partner)
    assert torch.equal(dx, expected)
    turned = unpool_by_hand(dy.flip(0), cell, replaced.flip(0), 11 - partner).flip(0)
    assert dtype in (torch.float16, torch.bfloat16) or not torch.equal(turned, expected)  # here the order shows


def terms(x: Tensor, replaced: Tensor, partner: Tensor, weights: Tensor) -> Tensor:
    return mixed_by_hand(x, replaced, partner).double() * weights.double()[:, :, None, None]


@MAPS
def test_mixed_cam(dtype, channels_last, aligned, partners, shape):
    x, replaced, partner = problem(shape, dtype, channels_last, aligned, partners)
    n, c, _, _ = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cam, weights = torch.empty(replaced.shape, dtype=wide), torch.randn(n, c, dtype=wide)
    run(KERNELS.mixed_cam, x, replaced, partner, weights, into=cam)
    exact = terms(x, replaced, partner, weights)
    error = (cam.double() - exact.sum(1).relu()).abs()
    assert (error <= (1e-14 if wide == torch.float64 else 1e-6) * exact.abs().sum(1)).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_mixed_cam_over_many_channels_is_exact_to_a_few_bits(channels_last):
    x, replaced, partner = problem((2, 2048, 4, 4), torch.float32, channels_last, True, "next")
    cam, weights = torch.empty(replaced.shape), torch.rand(2, 2048)
    run(KERNELS.mixed_cam, x.abs_(), replaced, partner, weights, into=cam)
    torch.testing.assert_close(cam.double(), terms(x, replaced, partner, weights).sum(1), rtol=5e-7, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("c", [8, 5])
def test_mixed_cam_keeps_nan_but_none_of_cells_not_taken(c, channels_last):
    x, replaced, partner = problem((3, c, 4, 4), torch.float32, channels_last, True, "next")
    special(x)
    cam, weights = torch.empty(replaced.shape), torch.rand(3, c)
    run(KERNELS.mixed_cam, x, replaced, partner, weights, into=cam)
    expected = terms(x, replaced, partner, weights).sum(1).relu()
    assert 0 < expected.isnan().sum() < expected.numel()
    torch.testing.assert_close(cam.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
