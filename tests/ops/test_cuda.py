"""What only a GPU can show: no host synchronisation, capture in a CUDA graph, the device's own assertion."""

import pytest
import torch

from pmm.ops import hard_mix, hard_mix_max_pool, mixed_cam
from tests.conftest import run_python

pytestmark = pytest.mark.gpu


def step(x, cam, partner, weights):
    """Every kernel once: gradient of x, and the CAM of the mixed map."""
    x = x.detach().requires_grad_()
    mixed, replaced = hard_mix(x, cam, partner)
    pooled, _ = hard_mix_max_pool(x, cam, partner)
    (dx,) = torch.autograd.grad(mixed.square().sum() + pooled.square().sum(), x)
    return dx, mixed_cam(x, partner, replaced, weights)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def arguments(request):
    torch.manual_seed(0)
    x = torch.randn(8, 64, 24, 8, device="cuda").contiguous(memory_format=request.param)
    return x, torch.rand(8, 24, 8, device="cuda"), torch.randperm(8, device="cuda"), torch.randn(8, 64, device="cuda")


def test_nothing_waits_for_the_device(arguments, monkeypatch):
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    step(*arguments)  # the library is loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_cuda_graph(arguments, monkeypatch):
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(*arguments)  # warm-up, away from the stream of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    arguments[0].copy_(torch.randn_like(arguments[0]))
    arguments[1].copy_(torch.rand_like(arguments[1]))
    arguments[2].copy_(arguments[2].roll(1))
    graph.replay()
    for found, expected in zip(captured, step(*arguments), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("op", ["hard_mix", "hard_mix_max_pool"])
def test_a_partner_outside_the_batch_is_an_assertion_of_the_device(op):
    script = (
        "import torch, pmm.ops\n"
        "x, cam, partner = torch.zeros(2, 8, 4, 4).cuda(), torch.ones(2, 4, 4).cuda(), torch.tensor([0, 2]).cuda()\n"
        f"pmm.ops.{op}(x, cam, partner, (2, 2), 1)\n"
        "torch.cuda.synchronize()\n"
    )
    done = run_python("-c", script, PMM_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
