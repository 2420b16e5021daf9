"""Backbones: an image [N, 3, H, W] to the feature map F1 [N, C, H/16, W/16], with stride 1 in the last stage."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import BasicBlock

STRIDE = 16
"""Pixels of the image per cell of the map, rounded up at the edge."""


class Backbone(nn.Module):
    """`trunk` (stem to layer3) followed by `layer4` without its stride; `channels` is C of its map."""

    def __init__(self, trunk: nn.Sequential, layer4: nn.Module, channels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.layer4 = layer4
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return self.layer4(self.trunk(images))


def resnet50_backbone() -> Backbone:
    """ResNet-50 (2,048 channels) with stride 1 in the first block of layer4 and in its downsample."""
    net = resnet50(weights=None)
    first = net.layer4[0]
    first.conv2.stride = (1, 1)
    first.downsample[0].stride = (1, 1)
    trunk = nn.Sequential()
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
        trunk.add_module(name, getattr(net, name))
    return Backbone(trunk, net.layer4, 2048)


def resnet10_backbone() -> Backbone:
    """A small ResNet-10 of basic blocks (128 channels) with a 3x3 stem, for two CPU cores."""
    trunk = nn.Sequential()
    trunk.add_module("conv1", nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False))
    trunk.add_module("bn1", nn.BatchNorm2d(16))
    trunk.add_module("relu", nn.ReLU(inplace=True))
    trunk.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    trunk.add_module("layer1", _basic(16, 16, stride=1))
    trunk.add_module("layer2", _basic(16, 32, stride=2))
    trunk.add_module("layer3", _basic(32, 64, stride=2))
    backbone = Backbone(trunk, _basic(64, 128, stride=1), 128)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _basic(inputs: int, outputs: int, stride: int) -> BasicBlock:
    if stride == 1 and inputs == outputs:
        return BasicBlock(inputs, outputs)
    downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, downsample)


BACKBONES: dict[str, Callable[[], Backbone]] = {"resnet50": resnet50_backbone, "resnet10": resnet10_backbone}


def build_backbone(name: str) -> Backbone:
    """The backbone of that name, randomly initialised."""
    return BACKBONES[name]()
