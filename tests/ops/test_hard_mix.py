import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from pmm.ops import hard_mix
from pmm.ops.block_ranking import block_ranks, block_scores
from tests.ops.reference import adjoint_by_hand, mixed_by_hand, ranks_by_hand, replaced_by_hand, scores_by_hand

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@st.composite
def problems(draw):
    n, c, h, w = (draw(st.integers(1, high)) for high in (5, 4, 7, 6))
    block = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    blocks = -(-h // block[0]) * -(-w // block[1])
    k = draw(st.integers(0, blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(n, c, h, w, generator=generator).to(draw(st.sampled_from(DTYPES)))
    # few distinct values, so that ties, empty samples and special values are common
    values = torch.tensor([0.0, 0.0, 0.25, 0.5, 1.0, -1.0, float("nan"), float("inf"), float("-inf")])
    cam = values[torch.randint(0, draw(st.integers(1, 9)), (n, h, w), generator=generator)]
    if draw(st.booleans()):
        cam = torch.randn(n, h, w, generator=generator).relu()
    cam = cam.to(draw(st.sampled_from((torch.float32, torch.float64))))
    partner = torch.randint(0, n, (n,), generator=generator)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, cam, partner, block, k, draw(st.sampled_from(("skip", "first")))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_the_definition(problem):
    x, cam, partner, block, k, on_empty = problem
    mixed, replaced = hard_mix(x, cam, partner, block, k, on_empty=on_empty)
    assert torch.equal(replaced, replaced_by_hand(cam, block, k, on_empty))
    assert torch.equal(mixed, mixed_by_hand(x, replaced, partner))
    assert mixed.dtype == x.dtype
    assert mixed.stride() == x.stride()


@settings(max_examples=60, deadline=None)
@given(problems())
def test_backward_equals_the_definition(problem):
    x, cam, partner, block, k, on_empty = problem
    x.requires_grad_()
    mixed, replaced = hard_mix(x, cam, partner, block, k, on_empty=on_empty)
    dy = torch.randn(x.shape).to(x.dtype)
    (dx,) = torch.autograd.grad(mixed, x, dy)
    expected = adjoint_by_hand(dy, replaced, partner)
    assert dx.dtype == x.dtype
    torch.testing.assert_close(dx, expected, rtol=0 if x.dtype == torch.float64 else 1e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_scores_have_the_bits_of_the_sequential_sum(problem):
    _, cam, _, block, _, _ = problem
    torch.testing.assert_close(block_scores(cam, block), scores_by_hand(cam, block), rtol=0, atol=0, equal_nan=True)


def test_ranks_put_ties_in_order_nan_last_and_inf_first():
    scores = torch.tensor([[1.0, float("nan"), float("inf"), 1.0, float("-inf"), 0.0, -0.0]])
    assert block_ranks(scores).tolist() == [[1, 5, 0, 2, 6, 3, 4]]
    assert block_ranks(scores)[0].tolist() == ranks_by_hand(scores[0].tolist())


def test_block_ids_run_down_the_columns():
    cam = torch.zeros(1, 4, 4)
    cam[0, 2, 0] = 1  # second row of blocks, first column: id 1
    _, replaced = hard_mix(torch.zeros(1, 1, 4, 4), cam, torch.tensor([0]), (2, 2), 2)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, :2] = True  # id 1 by its score
    expected[:2, :2] = True  # id 0 by the tie among the empty ones
    assert torch.equal(replaced[0], expected)


def test_paper_setting_replaces_three_of_thirty_two_blocks():
    cam = torch.rand(6, 24, 8)
    _, replaced = hard_mix(torch.randn(6, 2, 24, 8), cam, torch.arange(6).roll(1))
    assert replaced.flatten(1).sum(1).tolist() == [18] * 6
    assert 18 / (24 * 8) == 0.09375


def test_empty_cam_is_skipped_or_takes_the_first_blocks():
    x, partner = torch.randn(2, 3, 4, 4), torch.tensor([1, 0])
    cam = torch.zeros(2, 4, 4)
    cam[0] = float("nan")
    mixed, replaced = hard_mix(x, cam, partner, (2, 2), 1)
    assert not replaced.any()
    assert torch.equal(mixed, x)
    _, replaced = hard_mix(x, cam, partner, (2, 2), 1, on_empty="first")
    assert replaced[:, :2, :2].all()
    assert replaced.sum() == 8


def test_k_of_none_and_all():
    x, cam, partner = torch.randn(3, 2, 5, 4), torch.rand(3, 5, 4), torch.tensor([1, 2, 0])
    assert torch.equal(hard_mix(x, cam, partner, (2, 2), 0)[0], x)
    assert torch.equal(hard_mix(x, cam, partner, (2, 2), 6)[0], x[partner])


def test_cells_not_taken_leak_nothing_and_x_is_untouched():
    x = torch.full((2, 1, 2, 2), float("nan"))
    x[0] = 1.0
    before = x.clone()
    cam = torch.tensor([[[1.0, 0], [0, 0]], [[1.0, 0], [0, 0]]])
    mixed, _ = hard_mix(x, cam, torch.tensor([1, 0]), (1, 1), 1)
    assert mixed[0].flatten().isnan().tolist() == [True, False, False, False]
    assert mixed[1].flatten().isnan().tolist() == [False, True, True, True]
    assert torch.equal(x[0], before[0])
    assert x[1].isnan().all()


def test_a_sample_paired_with_itself_reports_its_selection():
    x, cam = torch.randn(1, 2, 2, 2), torch.rand(1, 2, 2) + 0.1
    mixed, replaced = hard_mix(x, cam, torch.tensor([0]), (1, 1), 2)
    assert torch.equal(mixed, x)
    assert replaced.sum() == 2


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty_batches_and_channels(shape):
    n, _, h, w = shape
    x = torch.zeros(shape, requires_grad=True)
    mixed, replaced = hard_mix(x, torch.rand(n, h, w), torch.zeros(n, dtype=torch.int64), (2, 2), 1)
    assert mixed.shape == shape
    assert replaced.shape == (n, h, w)
    mixed.sum().backward()
    assert x.grad.shape == shape


def test_strided_input():
    x = torch.randn(2, 6, 8, 4)[:, ::2, ::2]
    cam, partner = torch.rand(2, 4, 4), torch.tensor([1, 0])
    mixed, replaced = hard_mix(x, cam, partner, (2, 2), 1)
    assert torch.equal(mixed, mixed_by_hand(x, replaced, partner))
    assert mixed.is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck_and_gradgradcheck(channels_last):
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    cam, partner = torch.rand(4, 3, 3), torch.tensor([1, 1, 1, 0])

    def mix(value):
        return hard_mix(value, cam, partner, (2, 2), 2)[0]

    assert gradcheck(mix, x)
    assert gradgradcheck(mix, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(3, 2, 5, 4).to(dtype).requires_grad_()
    cam, partner = torch.rand(3, 5, 4), torch.tensor([1, 2, 0])
    torch.library.opcheck(torch.ops.pmm.hard_mix.default, (x, cam, partner, [2, 2], 2, "skip"))
    replaced = torch.rand(3, 5, 4) > 0.5
    torch.library.opcheck(torch.ops.pmm.hard_mix_select.default, (x, replaced, partner))
    torch.library.opcheck(torch.ops.pmm.hard_mix_adjoint.default, (x, replaced, partner))


def test_two_runs_are_bit_equal_and_deterministic_mode_is_fine():
    x = torch.randn(8, 16, 24, 8, requires_grad=True)
    cam, partner = torch.rand(8, 24, 8), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(hard_mix(x, cam, partner)[0].square().sum(), x)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


def test_works_under_autocast_and_export():
    x, cam, partner = torch.randn(2, 2, 4, 4), torch.rand(2, 4, 4), torch.tensor([1, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hard_mix(x, cam, partner, (2, 2), 1)[0].dtype == torch.float32

    class Mix(torch.nn.Module):
        def forward(self, x, cam, partner):
            return hard_mix(x, cam, partner, (2, 2), 1)[0]

    program = torch.export.export(Mix(), (x, cam, partner))
    assert torch.equal(program.module()(x, cam, partner), hard_mix(x, cam, partner, (2, 2), 1)[0])


GOOD = {
    "x": torch.zeros(2, 3, 4, 4),
    "cam": torch.zeros(2, 4, 4),
    "partner": torch.tensor([1, 0]),
    "block": (2, 2),
    "k": 1,
    "on_empty": "skip",
}
BAD = {
    "k below 0": {"k": -1},
    "k above the blocks": {"k": 5},
    "x without batch": {"x": torch.zeros(3, 4, 4)},
    "integer x": {"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)},
    "cam of another size": {"cam": torch.zeros(2, 4, 5)},
    "cam in half": {"cam": torch.zeros(2, 4, 4, dtype=torch.float16)},
    "partner of another length": {"partner": torch.tensor([1, 0, 1])},
    "partner in int32": {"partner": torch.tensor([1, 0], dtype=torch.int32)},
    "cam on another device": {"cam": torch.zeros(2, 4, 4, device="meta")},
    "block of one number": {"block": (2,)},
    "empty block": {"block": (0, 2)},
    "unknown on_empty": {"on_empty": "maybe"},
}


@pytest.mark.parametrize("fake", [False, True], ids=["reference", "fake"])
@pytest.mark.parametrize("change", BAD.values(), ids=list(BAD))
def test_bad_arguments_raise_the_same_value_error_everywhere(change, fake):
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = {**GOOD, **change}
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad() as mode:
        tensors = [arguments[name] for name in ("x", "cam", "partner")]
        if fake:
            tensors = [mode.from_tensor(t) for t in tensors]
        with pytest.raises(ValueError, match=r"hard_mix: "):
            hard_mix(*tensors, arguments["block"], arguments["k"], on_empty=arguments["on_empty"])


@pytest.mark.parametrize("values", [[-1, 0], [0, 2]])
def test_partner_out_of_range_is_refused_on_the_cpu(values):
    with pytest.raises(ValueError, match=r"must be in \[0, 2\)"):
        hard_mix(*itertools.islice(GOOD.values(), 2), torch.tensor(values), (2, 2), 1)
