"""What a factory may return, and that the function leaves its module as it was."""

import pytest
import torch
from torch import nn

from pmm.adoption.adopt import adopt, checksum, prepared
from pmm.adoption.user_code import CannotAdopt
from pmm.utils.errors import CannotWrite, ConflictingOptions
from tests.adoption.networks import SIZE, Plain, Unusual, returns_a_dict
from tests.refusals import refuses


def test_a_network_is_taken_out_of_what_wraps_it_in_eval_mode_and_fp32():
    for wrapped in (Plain(), Plain().half(), nn.DataParallel(Plain()), torch.compile(Plain(), backend="eager")):
        network = prepared(wrapped, "m:f")
        assert type(network) is Plain
        assert not network.training
        assert {value.dtype for value in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [None, Plain, returns_a_dict(), (Plain(), 3)])
def test_what_is_no_network_is_told_by_its_type(value):
    with refuses(CannotAdopt, "m:f", type(value).__name__, expected="nn.Module"):
        prepared(value, "m:f")


def test_other_weights_have_another_checksum():
    module = Plain()
    before = checksum(module.state_dict())
    assert before == checksum(module.state_dict())
    with torch.no_grad():
        module.norm.running_mean[0] += 1
    assert checksum(module.state_dict()) != before


def test_the_module_stays_as_it_was_and_nothing_is_written_on_failure(tmp_path):
    module = Plain().double().train()
    network = adopt(module, tmp_path / "model.pth", height=SIZE[0], width=SIZE[1])
    assert (module.training, module.conv.weight.dtype, module.conv.weight.requires_grad) == (True, torch.float64, True)
    images = torch.randn(3, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(network(images), Plain.forward(module.float().eval(), images))
    for kind, out, facts, more in (
        (CannotWrite, "model.onnx", (".pth",), {}),
        (CannotAdopt, "other.pth", ("aten.logcumsumexp.default",), {}),
        (ConflictingOptions, "other.pth", ("root",), {"root": str(tmp_path)}),
    ):
        with refuses(kind, *facts):
            adopt(Unusual(), tmp_path / out, height=SIZE[0], width=SIZE[1], **more)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
