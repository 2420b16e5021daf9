import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

from pmm.ops import hard_mix, hard_mix_max_pool
from tests.ops.test_hard_mix import BAD, DTYPES, GOOD, problems


def composed(x, cam, partner, block, k, on_empty):
    mixed, replaced = hard_mix(x, cam, partner, block, k, on_empty=on_empty)
    return F.adaptive_max_pool2d(mixed, 1).flatten(1), replaced


@settings(max_examples=100, deadline=None)
@given(problems())
def test_equals_mix_then_pool_with_gradients(problem):
    x, cam, partner, block, k, on_empty = problem
    x.requires_grad_()
    pooled, replaced = hard_mix_max_pool(x, cam, partner, block, k, on_empty=on_empty)
    expected, expected_replaced = composed(x, cam, partner, block, k, on_empty)
    assert torch.equal(pooled, expected)
    assert torch.equal(replaced, expected_replaced)
    dy = torch.randn(pooled.shape).to(x.dtype)
    (dx,) = torch.autograd.grad(pooled, x, dy)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-6, atol=0)
    assert dx.stride() == x.stride()


def test_ties_go_to_the_first_cell_and_nan_wins():
    x = torch.zeros(1, 2, 2, 2, requires_grad=True)
    cam, partner = torch.zeros(1, 2, 2), torch.tensor([0])
    pooled, _ = hard_mix_max_pool(x, cam, partner, (1, 1), 0)
    pooled.sum().backward()
    assert x.grad[0, 0].tolist() == [[1, 0], [0, 0]]
    y = torch.tensor([[[[1.0, float("nan")], [3.0, float("inf")]]]])
    assert hard_mix_max_pool(y, cam, partner, (1, 1), 0)[0].isnan().all()


def test_two_samples_that_take_from_one_cell_add_up():
    x = torch.zeros(3, 1, 1, 2, requires_grad=True)
    with torch.no_grad():
        x[0, 0, 0, 0] = 5.0
    cam = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    pooled, _ = hard_mix_max_pool(x, cam, torch.tensor([1, 0, 0]), (1, 1), 1)
    assert pooled.flatten().tolist() == [5, 5, 5]
    (pooled.flatten() * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert x.grad[0].flatten().tolist() == [7, 0]
    assert not x.grad[1:].any()


def test_backward_is_bit_equal_at_full_size_when_all_take_from_one_sample():
    x = torch.randn(128, 512, 24, 8)
    cam, partner = torch.rand(128, 24, 8), torch.zeros(128, dtype=torch.int64)
    x.requires_grad_()
    pooled, _ = hard_mix_max_pool(x, cam, partner, (3, 2), 16)
    dy = torch.randn(pooled.shape)
    first, *others = (torch.autograd.grad(pooled, x, dy, retain_graph=True)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck_and_gradgradcheck(channels_last):
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    cam, partner = torch.rand(4, 3, 3), torch.tensor([1, 1, 1, 0])

    def pool(value):
        return hard_mix_max_pool(value, cam, partner, (2, 2), 2)[0]

    assert gradcheck(pool, x)
    assert gradgradcheck(pool, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(3, 2, 5, 4).to(dtype).requires_grad_()
    cam, partner = torch.rand(3, 5, 4), torch.tensor([1, 2, 0])
    ops = torch.ops.pmm
    torch.library.opcheck(ops.hard_mix_max_pool.default, (x, cam, partner, [2, 2], 2, "skip"))
    _, replaced, cell = ops.hard_mix_max_pool(x.detach(), cam, partner, [2, 2], 2, "skip")
    dy = torch.randn(3, 2).to(dtype).requires_grad_()
    torch.library.opcheck(ops.hard_mix_unpool.default, (dy, cell, replaced, partner, False))
    torch.library.opcheck(ops.hard_mix_gather.default, (x, cell, replaced, partner))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty_batches_and_channels(shape):
    n, c, h, w = shape
    x = torch.zeros(shape, requires_grad=True)
    pooled, _ = hard_mix_max_pool(x, torch.rand(n, h, w), torch.zeros(n, dtype=torch.int64), (2, 2), 1)
    assert pooled.shape == (n, c)
    pooled.sum().backward()
    assert x.grad.shape == shape


def test_compiles_whole():
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    cam, partner = torch.rand(3, 4, 4), torch.tensor([1, 2, 0])

    def step(x):
        return hard_mix_max_pool(x * 2, cam, partner, (2, 2), 1)[0].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))


@pytest.mark.parametrize("change", BAD.values(), ids=list(BAD))
def test_bad_arguments(change):
    a = {**GOOD, **change}
    with pytest.raises(ValueError, match=r"hard_mix_max_pool: "):
        hard_mix_max_pool(a["x"], a["cam"], a["partner"], a["block"], a["k"], on_empty=a["on_empty"])


def test_a_map_without_cells_cannot_be_pooled():
    with pytest.raises(ValueError, match="at least one cell"):
        hard_mix_max_pool(torch.zeros(1, 2, 0, 3), torch.zeros(1, 0, 3), torch.tensor([0]), (1, 1), 0)
