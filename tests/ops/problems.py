"""What the tests of the ops share: problems to solve, and arguments good and bad."""

import hashlib

import pytest
import torch
from hypothesis import strategies as st

from pmm.ops import mixed_cam

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
DATASETS = (torch.contiguous_format, torch.channels_last)
ONE_DTYPE = [dtype if dtype == torch.float32 else pytest.param(dtype, marks=pytest.mark.full) for dtype in DTYPES]
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Those of `torch.library.opcheck` that take milliseconds; the other traces the op, whatever its dtype and kernel."""


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


def digest_of_sums(device):
    """The SHA-256 of sums over many channels and of several gradients: float addition shows in which order they ran."""
    digest, generator = hashlib.sha256(), torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for layout in DATASETS:
            x = torch.randn(4, 300, 13, 9, generator=generator).to(dtype).contiguous(memory_format=layout).to(device)
            replaced = (torch.rand(4, 13, 9, generator=generator) < 0.3).to(device)
            weights = torch.randn(4, 300, generator=generator).to(device)
            cam = mixed_cam(x, torch.tensor([1, 2, 3, 0], device=device), replaced, weights)
            dx = torch.ops.pmm.hard_mix_adjoint(x, replaced, torch.tensor([1, 0, 0, 0], device=device))
            for sums in (cam, dx):
                digest.update(sums.cpu().double().numpy().tobytes())
    return digest.hexdigest()


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
