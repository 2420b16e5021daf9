"""Backbones: an image [N, 3, H, W] to the feature map F1 [N, C, H/16, W/16], of some [N, C, H/32, W/32]."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import BasicBlock, ResNet

from pmm.config import TIMM
from pmm.models.instance_batch_norm import resnet50_ibn_a
from pmm.models.timm_network import timm_network
from pmm.utils.errors import InvalidValue, reason_of
from pmm.utils.extras import import_library


class Backbone(nn.Module):
    """What every backbone is."""

    channels: int
    """C of its map."""
    stride: int
    """Pixels of the image per cell of the map, each way; at the edge a cell may lie beyond the image."""

    def merge_branches(self) -> None:
        """Make one layer of parallel ones that only training needs; the network is in eval mode."""


class ResNetBackbone(Backbone):
    """`trunk` (stem to layer3) followed by `layer4`."""

    def __init__(self, trunk: nn.Sequential, layer4: nn.Module, channels: int, last_stride: int) -> None:
        super().__init__()
        self.stride = 16 * last_stride
        self.trunk = trunk
        self.layer4 = layer4
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return self.layer4(self.trunk(images))


class TimmBackbone(Backbone):
    """A network of timm; keys `net.*` are those of timm with features_only."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net, self.channels, self.stride = timm_network(name)

    def merge_branches(self) -> None:
        """Those of RepVGG, MobileOne, RepViT and the like."""
        import_library("timm.utils").reparameterize_model(self.net, inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)[-1]


def resnet50_backbone(net: ResNet | None = None, last_stride: int = 1) -> ResNetBackbone:
    """ResNet-50 (2,048 channels), or `net`, with that stride in the first block of layer4 and in its downsample."""
    net = net or resnet50(weights=None)
    first = net.layer4[0]
    first.conv2.stride = (last_stride, last_stride)
    first.downsample[0].stride = (last_stride, last_stride)
    trunk = nn.Sequential()
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
        trunk.add_module(name, getattr(net, name))
    return ResNetBackbone(trunk, net.layer4, 2048, last_stride)


def resnet10_backbone(last_stride: int = 1) -> ResNetBackbone:
    """A small ResNet-10 of basic blocks (128 channels) with a 3x3 stem, for two CPU cores."""
    trunk = nn.Sequential()
    trunk.add_module("conv1", nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False))
    trunk.add_module("bn1", nn.BatchNorm2d(16))
    trunk.add_module("relu", nn.ReLU(inplace=True))
    trunk.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    trunk.add_module("layer1", _basic(16, 16, stride=1))
    trunk.add_module("layer2", _basic(16, 32, stride=2))
    trunk.add_module("layer3", _basic(32, 64, stride=2))
    backbone = ResNetBackbone(trunk, _basic(64, 128, stride=last_stride), 128, last_stride)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _basic(inputs: int, outputs: int, stride: int) -> BasicBlock:
    if stride == 1 and inputs == outputs:
        return BasicBlock(inputs, outputs)
    downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, downsample)


BACKBONES: dict[str, Callable[[int], Backbone]] = {
    "resnet50": lambda last_stride: resnet50_backbone(last_stride=last_stride),
    "resnet50-ibn-a": lambda last_stride: resnet50_backbone(resnet50_ibn_a(), last_stride),
    "resnet10": resnet10_backbone,
}


def build_backbone(name: str, last_stride: int = 1) -> Backbone:
    """The backbone of that name, randomly initialised; ResNets have that stride in their last layer. Raises as
    `pmm.models.timm_network.timm_network` for those of timm."""
    return TimmBackbone(name.removeprefix(TIMM)) if name.startswith(TIMM) else BACKBONES[name](last_stride)


def with_sync_batch_norm(model: nn.Module) -> nn.Module:
    """`model` with batch-norm statistics over all processes."""
    if isinstance(backbone := model.backbone, TimmBackbone):
        # torch's own conversion would drop the activations that timm has in its batch-norms
        model.backbone = import_library("timm.layers").convert_sync_batchnorm(backbone)
    else:
        model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    for name, child in model.named_children():
        if name != "backbone":
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
    return model


@cache
def map_size(name: str, height: int, width: int, last_stride: int = 1) -> tuple[int, int]:
    """Cells of the backbone's map, down and across, for crops of that size; nothing is computed.

    Raises InvalidValue for a backbone that does not take such crops.
    """
    with torch.device("meta"):
        backbone = build_backbone(name, last_stride)
    try:
        _, _, rows, columns = backbone.eval()(torch.empty(1, 3, height, width, device="meta")).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        problem = f"one that takes {height}x{width} crops"
        raise InvalidValue("--backbone", name, problem, hint=f"it said: {reason_of(error)}") from error
    return rows, columns
