"""BGR without moving a channel: every convolution that reads the images takes it."""

import torch
from torch import nn

from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.models.output import InferenceModel
from pmm.runtime.deployed_graph import DeployedGraph
from pmm.utils.errors import UserError
from tests.refusals import refuses

SIZE = Preprocessing(height=16, width=8, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.one, self.two = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        return (self.last(self.one(images) + self.two(images)),)


class Unshuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 2, 1))

    def forward(self, images):
        return (self.steps(images),)


class Means(nn.Module):
    def forward(self, maps):
        return maps.mean((2, 3))


class FirstOfTwo(nn.Module):
    def forward(self, maps):
        means = maps.mean((2, 3))
        return torch.stack([means, -means], 1)[:, 0]


def graph_of(trunk, colour="rgb", tail=None, **embedding):
    network = InferenceModel(trunk, tail or Means(), normalised=False)
    return DeployedGraph(
        network, SIZE, InputContract.of("uint8", colour), EmbeddingContract(dim=2, **embedding), precision="fp32"
    ).eval()


def test_every_convolution_of_the_images_takes_bgr_and_no_other():
    torch.manual_seed(0)
    net, images = Branches(), torch.randint(0, 256, (2, 16, 8, 3), dtype=torch.uint8)
    expected = graph_of(net, "rgb")(images)
    torch.testing.assert_close(graph_of(net, "bgr")(images.flip(3)), expected)


def test_another_first_step_is_refused():
    with refuses(UserError, "no convolution", hint="--input-colour"):
        graph_of(Unshuffled(), "bgr")


def test_mirror_images_of_a_network_that_returns_a_slice():
    torch.manual_seed(0)
    net, images = Branches(), torch.randint(0, 256, (3, 16, 8, 3), dtype=torch.uint8)
    graph, plain = graph_of(net, tail=FirstOfTwo(), flip_tta=True), graph_of(net)
    torch.testing.assert_close(graph(images), (plain(images) + plain(images.flip(2))) / 2)
