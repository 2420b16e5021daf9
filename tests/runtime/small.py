"""A deployed graph of one convolution: compiled in a fraction of the time of a whole trunk."""

import torch
from torch import nn

from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.models.output import InferenceModel
from pmm.runtime.deployed_graph import DeployedGraph


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=4, padding=1)

    def forward(self, images):
        return (self.conv(images).relu(),)


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 384)

    def forward(self, maps):
        return self.head(maps.mean((2, 3)))


def small_graph(size):
    """For crops of `size` (a Preprocessing); the same weights each time."""
    torch.manual_seed(0)
    network = InferenceModel(Trunk(), Tail(), normalised=False)
    return DeployedGraph(network, size, InputContract(), EmbeddingContract(dim=384), "fp32").eval()
