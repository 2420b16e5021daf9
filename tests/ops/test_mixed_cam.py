import pytest
import torch

from pmm.ops import mixed_cam
from pmm.ops.mixed_cam import cam
from tests.ops.conftest import ONE_PLACE
from tests.ops.problems import DATASETS, DTYPES, ONE_DTYPE, OPCHECKS


def problem(device, dtype=torch.float32, shape=(4, 6, 5, 3), layout=torch.contiguous_format):
    n, c, h, w = shape
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    arguments = x, torch.arange(n).roll(-1), torch.rand(n, h, w) > 0.5, torch.randn(n, c)
    return tuple(argument.to(device) for argument in arguments)


def expected(x, partner, replaced, weights):
    mixed = torch.where(replaced[:, None], x[partner], x).double()
    return (mixed * weights.double()[:, :, None, None]).sum(1).clamp(min=0)


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_cam_of_the_mixed_map(device, place, dtype, layout):
    arguments = problem(device, dtype, layout=layout)
    found = mixed_cam(*arguments)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected(*arguments), rtol=1e-5, atol=1e-5)
    x, partner, replaced, weights = arguments
    of_the_map = cam(torch.where(replaced[:, None], x[partner], x), weights)
    if place == "reference":
        assert torch.equal(found, of_the_map)


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cam_of_a_map_is_that_of_one_where_nothing_is_replaced(device, dtype, layout):
    x, partner, replaced, weights = problem(device, dtype, layout=layout)
    assert torch.equal(cam(x, weights), mixed_cam(x, partner, replaced & False, weights))


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("shape", [(3, 700, 24, 8), (2, 130, 17, 19), (5, 64, 1, 1), (1, 3, 40, 30), (2, 9, 1, 300)])
def test_long_sums_and_odd_shapes(device, shape, layout):
    """In float32 no cell is further off than a blocked sum of its terms may be."""
    arguments = problem(device, torch.float32, shape, layout)
    found, (x, partner, replaced, weights) = mixed_cam(*arguments).double(), arguments
    scale = expected(x.abs(), partner, replaced, weights.abs())
    assert ((found - expected(*arguments)).abs() <= 3e-6 * scale).all()


@pytest.mark.parametrize("layout", DATASETS)
def test_a_long_sum_of_positive_terms_is_exact_to_a_few_bits(device, layout):
    """One term after another would be three times as far off."""
    x, partner, replaced, weights = problem(device, torch.float32, (2, 8192, 4, 4), layout)
    arguments = x.abs(), partner, replaced, weights.abs()
    torch.testing.assert_close(mixed_cam(*arguments).double(), expected(*arguments), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", DATASETS)
@pytest.mark.parametrize("place_in_map", [0, 255, 256, 700, 1199])
def test_one_cell_of_many_is_taken_from_the_partner(device, layout, place_in_map):
    x, partner, replaced, weights = problem(device, torch.float32, (2, 3, 40, 30), layout)
    replaced[:] = False
    replaced.flatten(1)[1, place_in_map] = True
    found = mixed_cam(x, partner, replaced, weights)
    torch.testing.assert_close(found.double(), expected(x, partner, replaced, weights), rtol=1e-5, atol=1e-5)


def test_nan_stays_and_cells_not_taken_leak_nothing(device):
    x = torch.zeros(2, 3, 1, 2, device=device)
    x[1, 0, 0, 0] = float("nan")
    replaced = torch.tensor([[[True, False]], [[True, False]]], device=device)
    found = mixed_cam(x, torch.tensor([1, 0], device=device), replaced, torch.ones(2, 3, device=device))
    assert found.isnan().flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(device, shape):
    found = mixed_cam(*problem(device, shape=shape))
    assert found.shape == (shape[0], *shape[2:])
    assert not found.any()


def test_carries_no_gradient_and_half_precision_does_not_overflow(device):
    x, partner, replaced, weights = problem(device)
    assert not mixed_cam(x.requires_grad_(), partner, replaced, weights.requires_grad_()).requires_grad
    assert not cam(x, weights).requires_grad
    huge = torch.full((1, 4, 2, 2), 6e4, dtype=torch.float16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = cam(huge, torch.ones(1, 4, device=device))
    assert found.flatten().tolist() == [huge[0, 0, 0, 0].item() * 4] * 4


def opcheck(device, dtype, utils):
    x, partner, replaced, weights = problem(device, dtype)
    torch.library.opcheck(torch.ops.pmm.mixed_cam.default, (x, partner, replaced, weights), test_utils=utils)
    torch.library.opcheck(torch.ops.pmm.cam.default, (x, weights), test_utils=utils)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    opcheck(device, dtype, OPCHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("place", ONE_PLACE, indirect=True)
def test_opcheck_of_the_traced_op(device, dtype):
    opcheck(device, dtype, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, torch.zeros(4, 6, 5)),
        (1, torch.tensor([0, 1])),
        (2, torch.zeros(4, 5, 3)),
        (3, torch.zeros(4, 5)),
    ],
)
def test_bad_arguments(device, position, value):
    arguments = list(problem(device))
    arguments[position] = value.to(device)
    with pytest.raises(ValueError, match="mixed_cam: "):
        mixed_cam(*arguments)


def test_partner_out_of_range_is_refused_on_the_cpu(place):
    if place == "cuda":
        pytest.skip("on a GPU it is an assertion of the device: tests/ops/test_cuda.py")
    x, _, replaced, weights = problem("cpu")
    with pytest.raises(ValueError, match=r"mixed_cam: .* must be in \[0, 4\)"):
        mixed_cam(x, torch.tensor([0, 1, 2, 4]), replaced, weights)


@pytest.mark.parametrize("weights", [torch.zeros(4, 5), torch.zeros(4, 6, dtype=torch.int32)])
def test_bad_weights_of_a_cam(device, weights):
    with pytest.raises(ValueError, match=r"cam: weights are torch\.\w+ .* floating \[4, 6\]"):
        cam(problem(device)[0], weights.to(device))
