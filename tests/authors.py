"""The networks of the PMM authors' code and of BDB's at test time, as plain torch modules with their parameters' names.

Written from what their checkpoints hold and what the networks compute; nothing of `pmm` is used.
"""

import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

TRUNK = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")


class Authors(nn.Module):
    """`branches`: number in the name and features of each branch that reads the extra bottleneck."""

    def __init__(self, num_classes, branches):
        super().__init__()
        net = resnet50(weights=None)
        self.backbone = nn.Sequential(*(getattr(net, name) for name in TRUNK))
        self.res_part = net.layer4
        self.res_part[0].conv2.stride = self.res_part[0].downsample[0].stride = (1, 1)
        self.global_reduction = nn.Sequential(nn.Conv2d(2048, 512, 1), nn.BatchNorm2d(512), nn.ReLU())
        self.global_softmax = nn.Linear(512, num_classes)
        self.res_part2 = Bottleneck(2048, 512)
        self.numbers = [number for number, _ in branches]
        for number, dim in branches:
            reduction = nn.Sequential(nn.Linear(2048, dim), nn.BatchNorm1d(dim), nn.ReLU())
            self.add_module(f"reduction{number}", reduction)
            self.add_module(f"softmax{number}", nn.Linear(dim, num_classes))

    def forward(self, images):
        """[N, 3, H, W] -> features [N, 1536]."""
        maps = self.res_part(self.backbone(images))
        features = [self.global_reduction(nn.functional.adaptive_avg_pool2d(maps, 1)).flatten(1)]
        largest = nn.functional.adaptive_max_pool2d(self.res_part2(maps), 1).flatten(1)
        features += [getattr(self, f"reduction{number}")(largest) for number in self.numbers]
        return torch.cat(features, 1)


def authors_network(method, num_classes=5, seed=0):
    """Random weights, and batch-norm parameters and statistics that are no defaults, in eval mode."""
    torch.manual_seed(seed)
    net = _unfilled(method, num_classes).to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "bias") and module.bias is not None:
            nn.init.uniform_(module.bias, -0.2, 0.2)
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(17)
    return net.eval()


def hollow(method, num_classes=5):
    """Their state dict with every shape right, every weight 0.5 and hardly a byte in it."""
    half, state = torch.tensor(0.5), _unfilled(method, num_classes).state_dict()
    return {key: half.expand(v.shape) if v.is_floating_point() else torch.tensor(3) for key, v in state.items()}


def _unfilled(method, num_classes):
    with torch.device("meta"):
        return Authors(num_classes, {"pmm": [("1", 512), ("2", 512)], "bdb": [("", 1024)]}[method])
