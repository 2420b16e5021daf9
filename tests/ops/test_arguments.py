"""What the ops refuse: the same ValueError from reference, kernels and fake."""

import pytest
import torch

from pmm.ops import hard_mix, hard_mix_max_pool
from tests.ops.problems import BAD, GOOD, placed


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


@pytest.mark.parametrize("change", BAD.values(), ids=list(BAD))
def test_bad_arguments(device, change):
    a = placed({**GOOD, **change}, device)
    with pytest.raises(ValueError, match=r"hard_mix_max_pool: "):
        hard_mix_max_pool(a["x"], a["cam"], a["partner"], a["block"], a["k"], on_empty=a["on_empty"])


UNPOOL = {"dy": torch.zeros(2, 3), "cell": torch.zeros(2, 3, dtype=torch.int64), "replaced": torch.zeros(2, 4, 4) > 0,
          "partner": torch.tensor([1, 0])}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"dy": torch.zeros(2, 3, 4)},
        {"dy": torch.zeros(2, 3, dtype=torch.int32)},
        {"cell": torch.zeros(2, 4, dtype=torch.int64)},
        {"cell": torch.zeros(2, 3, dtype=torch.int32)},
        {"replaced": torch.zeros(3, 4, 4) > 0},
        {"replaced": torch.zeros(2, 4, 4)},
        {"partner": torch.tensor([1, 0, 1])},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments_of_the_transpose(device, change):
    a = placed({**UNPOOL, **change}, device)
    with pytest.raises(ValueError, match="hard_mix_unpool: "):
        torch.ops.pmm.hard_mix_unpool(*a.values(), False)


def test_cells_and_partners_outside_are_refused_on_the_cpu(place):
    if place == "cuda":
        pytest.skip("on a GPU it is an assertion of the device: tests/ops/test_cuda.py")
    for change in (
        {"cell": torch.full((2, 3), 16)},
        {"cell": torch.full((2, 3), -1)},
        {"partner": torch.tensor([0, 2])},
    ):
        a = {**UNPOOL, **change}
        with pytest.raises(ValueError, match=r"hard_mix_unpool: .* must be in \[0, (16|2)\)"):
            torch.ops.pmm.hard_mix_unpool(*a.values(), False)
        with pytest.raises(ValueError, match=r"hard_mix_gather: .* must be in \[0, (16|2)\)"):
            torch.ops.pmm.hard_mix_gather(torch.zeros(2, 3, 4, 4), *list(a.values())[1:])


@pytest.mark.parametrize("mix", [hard_mix, hard_mix_max_pool])
def test_forward_mode_is_refused_rather_than_taken_for_zero(device, mix):
    a = placed(GOOD, device)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative; use reverse mode"):
        torch.func.jvp(lambda x: mix(x, a["cam"], a["partner"], (2, 2), 1)[0], (a["x"],), (a["x"],))


@pytest.mark.parametrize("mix", [hard_mix, hard_mix_max_pool])
def test_a_cam_that_requires_a_gradient_asks_for_none(device, mix):
    a = placed(GOOD, device)
    assert not mix(a["x"], a["cam"].requires_grad_(), a["partner"], (2, 2), 1)[0].requires_grad
    a["cam"].requires_grad_(False)
