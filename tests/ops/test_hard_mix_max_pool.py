import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from pmm.ops import hard_mix, hard_mix_max_pool
from pmm.ops.hard_mix_max_pool import _reference, _unpool_reference
from tests.conftest import examples
from tests.ops.conftest import ONE_PLACE
from tests.ops.problems import DATASETS, DTYPES, INF, NAN, ONE_DTYPE, OPCHECKS, moved, problems


def composed(x, cam, partner, block, k, on_empty):
    mixed, replaced = hard_mix(x, cam, partner, block, k, on_empty=on_empty)
    return F.adaptive_max_pool2d(mixed, 1).flatten(1), replaced


@examples(100)
@given(problems())
def test_equals_mix_then_pool_with_gradients(device, problem):
    x, cam, partner, block, k, on_empty = moved(problem, device)
    x.requires_grad_()
    pooled, replaced = hard_mix_max_pool(x, cam, partner, block, k, on_empty=on_empty)
    expected, expected_replaced = composed(x, cam, partner, block, k, on_empty)
    assert torch.equal(pooled, expected)
    assert torch.equal(replaced, expected_replaced)
    dy = torch.randn(pooled.shape).to(x)
    (dx,) = torch.autograd.grad(pooled, x, dy)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-6, atol=0)
    assert dx.stride() == x.stride()


@st.composite
def awkward_maps(draw):
    """Maps of few distinct values, so that equal maxima, both zeros, infinities and NaN meet in one plane."""
    shape = draw(st.sampled_from(((2, 3, 5, 7), (3, 17, 24, 8), (2, 33, 4, 4), (1, 2, 9, 31))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    some = draw(st.lists(st.sampled_from((0.0, -0.0, 1.0, -2.0, 3e-8, -3e-8, INF, -INF, NAN)), min_size=1, max_size=4))
    x = torch.tensor(some)[torch.randint(0, len(some), shape, generator=generator)].to(draw(st.sampled_from(DTYPES)))
    replaced = torch.rand(shape[0], *shape[2:], generator=generator) < 0.3
    partner = torch.randint(0, shape[0], shape[:1], generator=generator)
    return x.contiguous(memory_format=draw(st.sampled_from(DATASETS))), replaced, partner


@examples(120)
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
@given(awkward_maps())
def test_ties_zeros_and_nan_as_in_torchs_max_pool(device, maps):
    x, replaced, partner = maps
    # scores of one cell each: the replaced ones first, so that k of them are exactly these
    k = int(replaced.flatten(1).sum(1).max())
    replaced[:] = replaced[replaced.flatten(1).sum(1).argmax()]
    expected = _reference(x, replaced.float(), partner, [1, 1], k, "first")
    arguments = moved((x, replaced.float(), partner), device)
    found = torch.ops.pmm.hard_mix_max_pool(*arguments, [1, 1], k, "first")
    assert torch.equal(found[1].cpu(), replaced)
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[2].cpu(), expected[2])
    dy = torch.randn(x.shape[:2]).to(x.dtype)
    layout = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    dx = torch.ops.pmm.hard_mix_unpool(dy.to(device), *(t.to(device) for t in (expected[2], replaced, partner)), layout)
    assert torch.equal(dx.cpu(), _unpool_reference(dy, expected[2], replaced, partner, layout))


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("cells", [(180, 190), (1, 70_000)])
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_planes_of_more_cells_than_a_short_integer_counts(device, cells, layout):
    x = torch.randn(2, 3, *cells).to(torch.bfloat16).contiguous(memory_format=layout)
    x[0, 0, -1, -1] = 9.0
    x[0, 1, -1, -2] = x[0, 1, 0, 0] = 9.0
    x[1, 2, -1, -3] = float("nan")
    cam, partner = torch.rand(2, *cells), torch.tensor([1, 0])
    expected = _reference(x, cam, partner, [90, 64], 0, "skip")
    found = torch.ops.pmm.hard_mix_max_pool(*moved((x, cam, partner), device), [90, 64], 0, "skip")
    assert torch.equal(found[2].cpu(), expected[2])
    assert found[2][0, 1] == 0
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=0, equal_nan=True)


def test_ties_go_to_the_first_cell_and_nan_wins(device):
    x = torch.zeros(1, 2, 2, 2, requires_grad=True, device=device)
    cam, partner = torch.zeros(1, 2, 2, device=device), torch.tensor([0], device=device)
    pooled, _ = hard_mix_max_pool(x, cam, partner, (1, 1), 0)
    pooled.sum().backward()
    assert x.grad[0, 0].tolist() == [[1, 0], [0, 0]]
    y = torch.tensor([[[[1.0, float("nan")], [3.0, float("inf")]]]], device=device)
    assert hard_mix_max_pool(y, cam, partner, (1, 1), 0)[0].isnan().all()


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_zeros_are_equal_and_the_first_is_taken(device, dtype, layout):
    zeros = torch.tensor([[-0.0] * 40 + [0.0] * 40, [0.0] * 40 + [-0.0] * 40], dtype=dtype)
    x = zeros.view(1, 2, 10, 8).contiguous(memory_format=layout)
    arguments = moved((x, torch.zeros(1, 10, 8), torch.tensor([0])), device)
    pooled, _, cell = torch.ops.pmm.hard_mix_max_pool(*arguments, [1, 1], 0, "skip")
    assert cell.tolist() == [[0, 0]]
    assert pooled.signbit().tolist() == [[True, False]]


def test_two_samples_that_take_from_one_cell_add_up(device):
    x = torch.zeros(3, 1, 1, 2, requires_grad=True, device=device)
    with torch.no_grad():
        x[0, 0, 0, 0] = 5.0
    cam = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[1.0, 0.0]]], device=device)
    pooled, _ = hard_mix_max_pool(x, cam, torch.tensor([1, 0, 0], device=device), (1, 1), 1)
    assert pooled.flatten().tolist() == [5, 5, 5]
    (pooled.flatten() * torch.tensor([1.0, 2.0, 4.0], device=device)).sum().backward()
    assert x.grad[0].flatten().tolist() == [7, 0]
    assert not x.grad[1:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_gradients_at_one_cell_are_rounded_once(device, dtype):
    """1 + 8 * 2^-12 is 1 if every step is rounded to half, and more if the sum is."""
    dy = torch.full((9, 1), 2.0**-12 if dtype == torch.float16 else 2.0**-9)
    dy[0] = 1
    replaced = torch.ones(9, 1, 1, dtype=torch.bool)
    replaced[0] = False
    nowhere = torch.zeros(9, dtype=torch.int64)
    dx = torch.ops.pmm.hard_mix_unpool(
        *moved((dy.to(dtype), nowhere[:, None], replaced), device), nowhere.to(device), False
    )
    assert dx.flatten().tolist() == [1 + 8 * dy[1].item()] + [0] * 8


@pytest.mark.parametrize(("n", "c"), [(16, 64), pytest.param(128, 512, marks=pytest.mark.full)])
def test_backward_is_bit_equal_on_many_threads_when_all_take_from_one_sample(device, place, threads, n, c):
    if place == "emulated" and n > 16:
        pytest.skip("its threads run one after another: minutes")
    x = torch.randn(n, c, 24, 8, device=device)
    cam, partner = torch.rand(n, 24, 8, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    x.requires_grad_()
    pooled, _ = hard_mix_max_pool(x, cam, partner, (3, 2), 16)
    dy = torch.randn(pooled.shape, device=device)
    first, *others = (torch.autograd.grad(pooled, x, dy, retain_graph=True)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [(3, 2, 3, 2), pytest.param((4, 2, 3, 3), marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_gradcheck_and_gradgradcheck(device, layout, shape):
    n, _, h, w = shape
    x = torch.randn(shape, dtype=torch.float64, device=device).contiguous(memory_format=layout).requires_grad_()
    cam, partner = torch.rand(n, h, w, device=device), torch.tensor([*[1] * (n - 1), 0], device=device)

    def pool(value):
        return hard_mix_max_pool(value, cam, partner, (2, 2), 1)[0]

    assert gradcheck(pool, x)
    assert gradgradcheck(pool, x)


def opcheck(device, dtype, utils):
    x = torch.randn(3, 2, 5, 4, device=device).to(dtype).requires_grad_()
    cam, partner = torch.rand(3, 5, 4, device=device), torch.tensor([1, 2, 0], device=device)
    ops = torch.ops.pmm
    torch.library.opcheck(ops.hard_mix_max_pool.default, (x, cam, partner, [2, 2], 2, "skip"), test_utils=utils)
    _, replaced, cell = ops.hard_mix_max_pool(x.detach(), cam, partner, [2, 2], 2, "skip")
    dy = torch.randn(3, 2, device=device).to(dtype).requires_grad_()
    torch.library.opcheck(ops.hard_mix_unpool.default, (dy, cell, replaced, partner, False), test_utils=utils)
    torch.library.opcheck(ops.hard_mix_gather.default, (x, cell, replaced, partner), test_utils=utils)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    opcheck(device, dtype, OPCHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_opcheck_of_the_traced_op(device, dtype):
    opcheck(device, dtype, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty_batches_and_channels(device, shape):
    n, c, h, w = shape
    x = torch.zeros(shape, requires_grad=True, device=device)
    partner = torch.zeros(n, dtype=torch.int64, device=device)
    pooled, _ = hard_mix_max_pool(x, torch.rand(n, h, w, device=device), partner, (2, 2), 1)
    assert pooled.shape == (n, c)
    pooled.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_compiles_whole(device):
    x = torch.randn(3, 2, 4, 4, requires_grad=True, device=device)
    cam, partner = torch.rand(3, 4, 4, device=device), torch.tensor([1, 2, 0], device=device)

    def step(x):
        return hard_mix_max_pool(x * 2, cam, partner, (2, 2), 1)[0].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))


def test_a_map_without_cells_cannot_be_pooled(device):
    empty = moved((torch.zeros(1, 2, 0, 3), torch.zeros(1, 0, 3), torch.tensor([0])), device)
    with pytest.raises(ValueError, match="at least one cell"):
        hard_mix_max_pool(*empty, (1, 1), 0)
