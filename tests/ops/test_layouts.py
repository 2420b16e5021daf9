"""Where the maps lie in memory: strided, shifted, with dimensions of size 1; and blocks larger than the map."""

import os

import pytest
import torch

from pmm.ops import hard_mix, hard_mix_max_pool, mixed_cam
from pmm.ops.mixed_cam import cam as cam_of
from tests.ops.problems import DATASETS, DTYPES, digest_of_sums
from tests.ops.reference import adjoint_by_hand, mixed_by_hand, replaced_by_hand


def test_strided_input(device):
    x = torch.randn(2, 6, 8, 4, device=device)[:, ::2, ::2]
    cam, partner = torch.rand(2, 4, 8, device=device)[..., ::2], torch.tensor([1, 9, 0, 9], device=device)[::2]
    mixed, replaced = hard_mix(x, cam, partner, (2, 2), 1)
    assert torch.equal(replaced.cpu(), replaced_by_hand(cam.cpu(), (2, 2), 1, "skip"))
    assert torch.equal(mixed.cpu(), mixed_by_hand(x.cpu(), replaced.cpu(), partner.cpu()))
    assert mixed.is_contiguous()
    pooled, _ = hard_mix_max_pool(x, cam, partner, (2, 2), 1)
    assert torch.equal(pooled, mixed.amax((2, 3)))
    weights = torch.rand(2, 6, device=device)[:, ::2]
    of_the_mixed = cam_of(mixed, weights.contiguous())
    torch.testing.assert_close(mixed_cam(x, partner, replaced, weights), of_the_mixed)


@pytest.mark.parametrize("layout", DATASETS)
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


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


ONE_WIDE = {
    "tokens as a map one cell wide": lambda: torch.randn(2, 5, 3).transpose(1, 2).unsqueeze(-1),
    "every second row of one sample": lambda: torch.randn(1, 3, 2, 4).contiguous(memory_format=torch.channels_last)[
        :, :, ::2
    ],
    "one channel of several": lambda: channels_last(3, 4, 2, 2)[:, 1:2],
    "an expanded sample": lambda: torch.randn(1, 3, 4, 2).expand(3, 3, 4, 2),
}


@pytest.mark.parametrize("make", ONE_WIDE.values(), ids=list(ONE_WIDE))
def test_a_dimension_of_size_one_may_have_any_stride(device, make):
    x = make().to(device)
    n, c, h, w = x.shape
    cam, partner = torch.rand(n, h, w, device=device), torch.arange(n, device=device).roll(1)
    mixed, replaced = hard_mix(x, cam, partner, (1, 1), 1)
    assert torch.equal(mixed.cpu(), mixed_by_hand(x.cpu(), replaced.cpu(), partner.cpu()))
    pooled, _ = hard_mix_max_pool(x, cam, partner, (1, 1), 1)
    assert torch.equal(pooled, mixed.amax((2, 3)))
    weights = torch.randn(n, c, device=device)
    torch.testing.assert_close(
        mixed_cam(x, partner, replaced, weights), (mixed * weights[..., None, None]).sum(1).relu()
    )


def test_sums_have_the_same_bits_on_any_number_of_threads(device, place, threads):
    """And in every build: PMM_TEST_BITS are those of another one."""
    if place == "reference":
        pytest.skip("torch's own sums promise nothing")
    digests = {os.environ["PMM_TEST_BITS"]} if "PMM_TEST_BITS" in os.environ else set()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        digests.add(digest_of_sums(device))
    assert len(digests) == 1


@pytest.mark.parametrize("block", [(2**63 - 1, 2), (3, 2**62), (2**40, 2**40)])
def test_a_block_larger_than_the_map_is_as_large_as_the_map(device, block):
    x, partner = torch.randn(2, 3, 4, 4, device=device), torch.tensor([1, 0], device=device)
    cam = torch.rand(2, 4, 4, device=device)
    small = tuple(min(size, 4) for size in block)
    for k in (0, 1):
        for found, expected in zip(
            hard_mix(x, cam, partner, block, k), hard_mix(x, cam, partner, small, k), strict=True
        ):
            assert torch.equal(found, expected)


def gathered(x, cam, partner):
    _, replaced, cell = torch.ops.pmm.hard_mix_max_pool(x.detach(), cam, partner, [3, 2], 3, "skip")
    return torch.ops.pmm.hard_mix_gather(x, cell, replaced, partner), replaced


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("mix", [hard_mix, hard_mix_max_pool, gathered])
def test_the_gradient_has_the_layout_of_the_map_also_that_of_a_sum(device, mix, layout):
    x = torch.randn(3, 4, 6, 4, device=device).contiguous(memory_format=layout).requires_grad_()
    partner = torch.tensor([1, 2, 0], device=device)
    mixed = mix(x, torch.rand(3, 6, 4, device=device), partner)[0]
    (dx,) = torch.autograd.grad(mixed.sum(), x)  # not x.grad, to which torch gives this layout itself
    assert dx.stride() == x.stride()
