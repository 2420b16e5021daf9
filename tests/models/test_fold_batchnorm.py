"""Batch-norm folded wherever a network has it, whatever its attributes are called."""

import pytest
import torch
from torch import nn

from pmm.models.backbone import build_backbone
from pmm.models.fold_batchnorm import fold_batch_norms
from pmm.models.instance_batch_norm import InstanceBatchNorm


def warmed(net, images):
    """With statistics and weights of batch-norms that are not those at the start."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    with torch.no_grad():
        net(images)
    return net.eval()


def test_folding_keeps_the_function():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 9, 9)
    net = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), images)
    with torch.no_grad():
        expected = net(images)
        folded = fold_batch_norms(net, images)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        torch.testing.assert_close(folded(images), expected)


class Odd(nn.Module):
    """Batch-norms of a sum, of what an activation wrote into, of what is read twice, and of a layer that runs twice."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.norm, self.head = kind, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        out = self.first(x)
        if self.kind == "of a sum":
            out = out + x
        if self.kind == "written into":
            out = nn.functional.relu(out, inplace=True)
        if self.kind == "runs twice":
            out = self.first(out)
        return self.head(self.norm(out)) + (out.mean() if self.kind == "read twice" else 0)


@pytest.mark.parametrize("kind", ["of a sum", "written into", "runs twice"])
def test_a_batch_norm_that_reads_no_layer_alone_stays(kind):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 9, 9)
    net = warmed(Odd(kind), images)
    with torch.no_grad():
        expected = net(images)
        assert isinstance(fold_batch_norms(net, images).norm, nn.BatchNorm2d)
        assert torch.equal(net(images), expected)


def test_a_folded_network_that_computes_something_else_is_refused():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 9, 9)
    with pytest.raises(ValueError, match="changed the output"):
        fold_batch_norms(warmed(Odd("read twice"), images), images)


def test_the_batch_norm_half_of_an_instance_batch_norm_is_folded():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 9, 9)
    net = warmed(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), InstanceBatchNorm(8), nn.ReLU()), images)
    with torch.no_grad():
        expected = net(images)
        folded = fold_batch_norms(net, images)
        assert isinstance(folded[1].BN, nn.Identity)
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("mobilenetv3_small_100", 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("repvgg_a0", 17), ("densenet121", 62)]),
    ],
)
def test_networks_of_timm_are_folded(name, left):
    """What is left reads a shortcut (RepVGG before its branches are merged) or a concatenation (DenseNet)."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    folded = fold_batch_norms(build_backbone(f"timm:{name}").eval(), torch.randn(1, 3, 32, 32))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
