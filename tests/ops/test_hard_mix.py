import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from pmm.ops import hard_mix
from pmm.ops.block_ranking import block_ranks, block_scores
from pmm.ops.hard_mix import _reference
from tests.ops.reference import adjoint_by_hand, mixed_by_hand, ranks_by_hand, replaced_by_hand, scores_by_hand

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@st.composite
def problems(draw):
    """A mix on the CPU: x, cam, partner, block, k, on_empty. A map of many cells now and then, for the fast paths."""
    n, c, h, w = (draw(st.integers(1, high)) for high in draw(st.sampled_from(((5, 4, 7, 6), (3, 9, 24, 8)))))
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


def moved(problem, device):
    """The problem on `device`; its first tensors are x, cam and partner."""
    return *(tensor.to(device) for tensor in problem[:3]), *problem[3:]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_the_definition(device, problem):
    x, cam, partner, block, k, on_empty = problem
    mixed, replaced = (t.cpu() for t in hard_mix(*moved(problem, device)[:5], on_empty=on_empty))
    assert torch.equal(replaced, replaced_by_hand(cam, block, k, on_empty))
    assert torch.equal(mixed, mixed_by_hand(x, replaced, partner))
    assert mixed.dtype == x.dtype
    assert mixed.stride() == x.stride()


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=100, deadline=None)
@given(problems())
def test_scores_have_the_bits_of_the_sequential_sum(problem):
    _, cam, _, block, _, _ = problem
    torch.testing.assert_close(block_scores(cam, block), scores_by_hand(cam, block), rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
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


def test_strided_input(device):
    x = torch.randn(2, 6, 8, 4, device=device)[:, ::2, ::2]
    cam, partner = torch.rand(2, 4, 8, device=device)[..., ::2], torch.tensor([1, 9, 0, 9], device=device)[::2]
    mixed, replaced = hard_mix(x, cam, partner, (2, 2), 1)
    assert torch.equal(replaced.cpu(), replaced_by_hand(cam.cpu(), (2, 2), 1, "skip"))
    assert torch.equal(mixed.cpu(), mixed_by_hand(x.cpu(), replaced.cpu(), partner.cpu()))
    assert mixed.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_starts_anywhere(device, dtype, layout):
    """Neither the map nor the cells lie where a vector could be read whole."""
    x = torch.randn(5, 3, 6, 8).to(dtype).contiguous(memory_format=layout)
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].as_strided(x.shape, x.stride()).copy_(x)
    replaced = (torch.rand(1 + 5 * 48) < 0.4)[1:].view(5, 6, 8).to(device)
    partner = torch.tensor([9, 3, 0, 1, 2, 2], device=device)[1:]
    mixed = torch.ops.pmm.hard_mix_select(shifted, replaced, partner)
    assert torch.equal(mixed.cpu(), mixed_by_hand(x, replaced.cpu(), partner.cpu()))
    dx = torch.ops.pmm.hard_mix_adjoint(shifted, replaced, partner)
    assert torch.equal(dx.cpu(), adjoint_by_hand(x, replaced.cpu(), partner.cpu()))


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck_and_gradgradcheck(device, channels_last):
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    cam, partner = torch.rand(4, 3, 3, device=device), torch.tensor([1, 1, 1, 0], device=device)

    def mix(value):
        return hard_mix(value, cam, partner, (2, 2), 2)[0]

    assert gradcheck(mix, x)
    assert gradgradcheck(mix, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    x = torch.randn(3, 2, 5, 4, device=device).to(dtype).requires_grad_()
    cam, partner = torch.rand(3, 5, 4, device=device), torch.tensor([1, 2, 0], device=device)
    torch.library.opcheck(torch.ops.pmm.hard_mix.default, (x, cam, partner, [2, 2], 2, "skip"))
    replaced = torch.rand(3, 5, 4, device=device) > 0.5
    torch.library.opcheck(torch.ops.pmm.hard_mix_select.default, (x, replaced, partner))
    torch.library.opcheck(torch.ops.pmm.hard_mix_adjoint.default, (x, replaced, partner))


@pytest.mark.parametrize("layout", LAYOUTS)
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


def placed(arguments, device):
    """The arguments of a mix, on `device` where they are not meant to be elsewhere."""
    return {key: a.to(device) if hasattr(a, "to") and not a.is_meta else a for key, a in arguments.items()}


def words_of(change, device, fake):
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = placed({**GOOD, **change}, device)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad() as mode:
        tensors = [arguments[name] for name in ("x", "cam", "partner")]
        if fake:
            tensors = [mode.from_tensor(t) for t in tensors]
        with pytest.raises(ValueError, match=r"hard_mix: ") as raised:
            hard_mix(*tensors, arguments["block"], arguments["k"], on_empty=arguments["on_empty"])
    return str(raised.value)


@pytest.mark.parametrize("change", BAD.values(), ids=list(BAD))
def test_bad_arguments_raise_the_same_value_error_everywhere(device, change):
    assert words_of(change, device, fake=False) == words_of(change, device, fake=True)


@pytest.mark.parametrize("values", [[-1, 0], [0, 2]])
def test_partner_out_of_range_is_refused_on_the_cpu(place, values):
    if place == "cuda":
        pytest.skip("on a GPU it is an assertion of the device: tests/ops/test_cuda.py")
    x, cam, partner = GOOD["x"], GOOD["cam"], torch.tensor(values)
    with pytest.raises(ValueError, match=r"must be in \[0, 2\)"):
        hard_mix(x, cam, partner, (2, 2), 1)
    for op in (torch.ops.pmm.hard_mix_select, torch.ops.pmm.hard_mix_adjoint):
        with pytest.raises(ValueError, match=r"must be in \[0, 2\)"):
            op(x, cam > 0, partner)
