import pytest
import torch
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

from pmm.ops import hard_mix, hard_mix_select
from pmm.ops.block_ranking import block_ranks, block_scores
from pmm.ops.hard_mix import _reference
from tests.conftest import examples
from tests.ops.conftest import ONE_PLACE
from tests.ops.problems import DATASETS, DTYPES, INF, NAN, ONE_DTYPE, OPCHECKS, moved, problems
from tests.ops.reference import adjoint_by_hand, mixed_by_hand, ranks_by_hand, replaced_by_hand, scores_by_hand


@examples(150)
@given(problems())
def test_equals_the_definition(device, problem):
    x, cam, partner, block, k, on_empty = problem
    mixed, replaced = (t.cpu() for t in hard_mix(*moved(problem, device)[:5], on_empty=on_empty))
    assert torch.equal(replaced, replaced_by_hand(cam, block, k, on_empty))
    assert torch.equal(mixed, mixed_by_hand(x, replaced, partner))
    assert mixed.dtype == x.dtype
    assert mixed.stride() == x.stride()


@examples(60)
@given(problems())
def test_backward_equals_the_definition(device, problem):
    x, cam, partner, block, k, on_empty = moved(problem, device)
    x.requires_grad_()
    mixed, replaced = hard_mix(x, cam, partner, block, k, on_empty=on_empty)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(mixed, x, dy)
    expected = adjoint_by_hand(dy.cpu(), replaced.cpu(), partner.cpu())
    assert dx.dtype == x.dtype
    assert dx.stride() == x.stride()
    assert torch.equal(dx.cpu(), expected)


@examples(100)
@given(problems())
def test_scores_have_the_bits_of_the_sequential_sum(problem):
    _, cam, _, block, _, _ = problem
    torch.testing.assert_close(block_scores(cam, block), scores_by_hand(cam, block), rtol=0, atol=0, equal_nan=True)


def test_the_cells_of_a_block_are_added_row_major(device):
    """In any other order, the first block would have a score of 1."""
    cam = torch.tensor([[[1e8, 1.0, 0.5, 0.0], [-1e8, 0.0, 0.0, 0.0]]])
    _, replaced = hard_mix(*moved((torch.zeros(1, 1, 2, 4), cam, torch.tensor([0])), device), (2, 2), 1)
    assert replaced[0].tolist() == [[False, False, True, True]] * 2


def test_ranks_put_ties_in_order_nan_last_and_inf_first():
    scores = torch.tensor([[1.0, float("nan"), float("inf"), 1.0, float("-inf"), 0.0, -0.0]])
    assert block_ranks(scores).tolist() == [[1, 5, 0, 2, 6, 3, 4]]
    assert block_ranks(scores)[0].tolist() == ranks_by_hand(scores[0].tolist())


def test_block_ids_run_down_the_columns(device):
    cam = torch.zeros(1, 4, 4)
    cam[0, 2, 0] = 1  # second row of blocks, first column: id 1
    _, replaced = hard_mix(*moved((torch.zeros(1, 1, 4, 4), cam, torch.tensor([0])), device), (2, 2), 2)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, :2] = True  # id 1 by its score
    expected[:2, :2] = True  # id 0 by the tie among the empty ones
    assert torch.equal(replaced[0].cpu(), expected)


def test_paper_setting_replaces_three_of_thirty_two_blocks(device):
    cam, partner = torch.rand(6, 24, 8, device=device), torch.arange(6, device=device).roll(1)
    _, replaced = hard_mix(torch.randn(6, 2, 24, 8, device=device), cam, partner)
    assert replaced.flatten(1).sum(1).tolist() == [18] * 6
    assert 18 / (24 * 8) == 0.09375


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_bit_equal_to_the_reference_in_the_paper_setting(device, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 40, 24, 8, generator=generator).to(dtype).contiguous(memory_format=layout)
    cam = torch.randn(12, 24, 8, generator=generator).relu()
    partner = torch.randint(0, 12, (12,), generator=generator)
    expected, cells = _reference(x, cam, partner, [3, 2], 3, "skip")
    mixed, replaced = (t.cpu() for t in hard_mix(*moved((x, cam, partner), device)))
    assert torch.equal(replaced, cells)
    assert torch.equal(mixed, expected)
    assert mixed.stride() == x.stride()


def test_empty_cam_is_skipped_or_takes_the_first_blocks(device):
    x, partner = torch.randn(2, 3, 4, 4, device=device), torch.tensor([1, 0], device=device)
    cam = torch.zeros(2, 4, 4, device=device)
    cam[0] = float("nan")
    mixed, replaced = hard_mix(x, cam, partner, (2, 2), 1)
    assert not replaced.any()
    assert torch.equal(mixed, x)
    _, replaced = hard_mix(x, cam, partner, (2, 2), 1, on_empty="first")
    assert replaced[:, :2, :2].all()
    assert replaced.sum() == 8


def test_k_of_none_and_all(device):
    x, cam, partner = moved((torch.randn(3, 2, 5, 4), torch.rand(3, 5, 4), torch.tensor([1, 2, 0])), device)
    assert torch.equal(hard_mix(x, cam, partner, (2, 2), 0)[0], x)
    assert torch.equal(hard_mix(x, cam, partner, (2, 2), 6)[0], x[partner])


def test_cells_not_taken_leak_nothing_and_x_is_untouched(device):
    x = torch.full((2, 1, 2, 2), float("nan"), device=device)
    x[0] = 1.0
    before = x.clone()
    cam = torch.tensor([[[1.0, 0], [0, 0]], [[1.0, 0], [0, 0]]], device=device)
    mixed, _ = hard_mix(x, cam, torch.tensor([1, 0], device=device), (1, 1), 1)
    assert mixed[0].flatten().isnan().tolist() == [True, False, False, False]
    assert mixed[1].flatten().isnan().tolist() == [False, True, True, True]
    assert torch.equal(x[0], before[0])
    assert x[1].isnan().all()


def test_gradients_of_cells_not_taken_leak_nothing(device):
    dy = torch.full((2, 1, 2, 2), float("inf"), device=device)
    replaced = torch.zeros(2, 2, 2, dtype=torch.bool, device=device)
    replaced[0] = True  # sample 0 gives its gradient to sample 1 whole, and keeps none
    dx = torch.ops.pmm.hard_mix_adjoint(dy, replaced, torch.tensor([1, 0], device=device))
    assert dx[0].eq(0).all()
    assert dx[1].eq(float("inf")).all()


def test_a_sample_paired_with_itself_reports_its_selection(device):
    x, cam = torch.randn(1, 2, 2, 2, device=device), torch.rand(1, 2, 2, device=device) + 0.1
    mixed, replaced = hard_mix(x, cam, torch.tensor([0], device=device), (1, 1), 2)
    assert torch.equal(mixed, x)
    assert replaced.sum() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_gradients_at_one_cell_are_rounded_once(device, dtype):
    """1 + 8 * 2^-12 is 1 if every step is rounded to half, and more if the sum is."""
    dy = torch.full((9, 1, 1, 1), 2.0**-12 if dtype == torch.float16 else 2.0**-9)
    dy[0] = 1
    replaced = torch.ones(9, 1, 1, dtype=torch.bool)
    replaced[0] = False
    dx = torch.ops.pmm.hard_mix_adjoint(*moved((dy.to(dtype), replaced, torch.zeros(9, dtype=torch.int64)), device))
    assert dx.flatten().tolist() == [1 + 8 * dy[1].item()] + [0] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_as_torch_rounds_them(device, dtype):
    """Over every exponent, past the largest number, and down to the smallest; NaN stays NaN."""
    powers = 2.0 ** torch.arange(-26, 17)
    some = torch.cat([powers, powers * 1.375, -powers * 1.9990234375, torch.tensor([INF, -INF, NAN, 65504.0, 0.0])])
    taken = (some * torch.linspace(0.2, 1.1, len(some))).to(dtype)
    dy = torch.stack([some.to(dtype), taken]).view(2, 1, 1, -1)
    replaced = torch.tensor([False, True])[:, None, None].expand(2, 1, len(some))
    dx = torch.ops.pmm.hard_mix_adjoint(*moved((dy, replaced, torch.tensor([0, 0])), device))
    expected = (dy[0].float() + dy[1].float()).to(dtype)
    torch.testing.assert_close(dx[0].cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_value_of_two_bytes_is_read_right(device, dtype, layout):
    """Beside nothing, and beside another one."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    others = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    replaced = torch.tensor([False, True])[:, None, None].expand(2, 16, 16)
    for second in (torch.zeros_like(values), others):
        dy = torch.stack([values, second]).view(dtype).view(2, 256, 16, 16).contiguous(memory_format=layout)
        dx = torch.ops.pmm.hard_mix_adjoint(*moved((dy, replaced, torch.tensor([0, 0])), device))
        expected = (dy[0].float() + dy[1].float()).to(dtype)
        torch.testing.assert_close(dx[0].cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty_batches_and_channels(device, shape):
    n, _, h, w = shape
    x = torch.zeros(shape, requires_grad=True, device=device)
    partner = torch.zeros(n, dtype=torch.int64, device=device)
    mixed, replaced = hard_mix(x, torch.rand(n, h, w, device=device), partner, (2, 2), 1)
    assert mixed.shape == shape
    assert replaced.shape == (n, h, w)
    mixed.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("shape", [(3, 2, 3, 2), pytest.param((4, 2, 3, 3), marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_gradcheck_and_gradgradcheck(device, layout, shape):
    n, _, h, w = shape
    x = torch.randn(shape, dtype=torch.float64, device=device).contiguous(memory_format=layout).requires_grad_()
    cam, partner = torch.rand(n, h, w, device=device), torch.tensor([*[1] * (n - 1), 0], device=device)

    replaced = hard_mix(x, cam, partner, (2, 2), 1)[1]

    def mix(value):
        return hard_mix(value, cam, partner, (2, 2), 1)[0]

    assert gradcheck(mix, x)
    assert gradgradcheck(mix, x)
    assert gradcheck(lambda value: hard_mix_select(value, replaced, partner), x)


def opcheck(device, dtype, utils):
    x = torch.randn(3, 2, 5, 4, device=device).to(dtype).requires_grad_()
    cam, partner = torch.rand(3, 5, 4, device=device), torch.tensor([1, 2, 0], device=device)
    torch.library.opcheck(torch.ops.pmm.hard_mix.default, (x, cam, partner, [2, 2], 2, "skip"), test_utils=utils)
    replaced = torch.rand(3, 5, 4, device=device) > 0.5
    torch.library.opcheck(torch.ops.pmm.hard_mix_select.default, (x, replaced, partner), test_utils=utils)
    torch.library.opcheck(torch.ops.pmm.hard_mix_adjoint.default, (x, replaced, partner), test_utils=utils)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    opcheck(device, dtype, OPCHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_opcheck_of_the_traced_op(device, dtype):
    opcheck(device, dtype, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("layout", DATASETS)
def test_two_runs_are_bit_equal_and_deterministic_mode_is_fine(device, layout):
    x = torch.randn(8, 16, 24, 8, device=device).contiguous(memory_format=layout).requires_grad_()
    cam, partner = torch.rand(8, 24, 8, device=device), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], device=device)
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(hard_mix(x, cam, partner)[0].square().sum(), x)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


def test_works_under_autocast_and_export(device):
    x, cam, partner = moved((torch.randn(2, 2, 4, 4), torch.rand(2, 4, 4), torch.tensor([1, 0])), device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert hard_mix(x, cam, partner, (2, 2), 1)[0].dtype == torch.float32

    class Mix(torch.nn.Module):
        def forward(self, x, cam, partner):
            return hard_mix(x, cam, partner, (2, 2), 1)[0]

    program = torch.export.export(Mix(), (x, cam, partner))
    assert torch.equal(program.module()(x, cam, partner), hard_mix(x, cam, partner, (2, 2), 1)[0])
