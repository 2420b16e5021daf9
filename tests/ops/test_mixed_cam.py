import pytest
import torch

from pmm.ops import mixed_cam
from pmm.ops.mixed_cam import cam


def problem(dtype=torch.float32):
    x = torch.randn(4, 6, 5, 3).to(dtype)
    return x, torch.tensor([1, 2, 3, 0]), torch.rand(4, 5, 3) > 0.5, torch.randn(4, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_the_cam_of_the_mixed_map(dtype):
    x, partner, replaced, weights = problem(dtype)
    mixed = torch.where(replaced[:, None], x[partner], x).double()
    expected = (mixed * weights.double()[:, :, None, None]).sum(1).clamp(min=0)
    found = mixed_cam(x, partner, replaced, weights)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, cam(torch.where(replaced[:, None], x[partner], x), weights))


def test_carries_no_gradient_and_half_precision_does_not_overflow():
    x, partner, replaced, weights = problem()
    assert not mixed_cam(x.requires_grad_(), partner, replaced, weights.requires_grad_()).requires_grad
    huge = torch.full((1, 4, 2, 2), 6e4, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cam(huge, torch.ones(1, 4)).eq(2.4e5).logical_or(cam(huge, torch.ones(1, 4)) > 2.3e5).all()


def test_opcheck():
    x, partner, replaced, weights = problem()
    torch.library.opcheck(torch.ops.pmm.mixed_cam.default, (x, partner, replaced, weights))


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, torch.zeros(4, 6, 5)),
        (1, torch.tensor([0, 1])),
        (2, torch.zeros(4, 5, 3)),
        (3, torch.zeros(4, 5)),
        (1, torch.tensor([0, 1, 2, 4])),
    ],
)
def test_bad_arguments(position, value):
    arguments = list(problem())
    arguments[position] = value
    with pytest.raises(ValueError, match="mixed_cam: "):
        mixed_cam(*arguments)
