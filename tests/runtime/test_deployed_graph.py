"""BGR without moving a channel: every convolution that reads the images takes it."""

import torch
from torch import nn

from pmm.data.preprocessing import Preprocessing
from pmm.runtime.deployed_graph import _reverse_channels
from pmm.utils.errors import UserError
from tests.refusals import refuses

SIZE = Preprocessing(height=16, width=8, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.one, self.two = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        return (self.last(self.one(images) + self.two(images)),)


def test_every_convolution_of_the_images_takes_bgr_and_no_other():
    torch.manual_seed(0)
    net, images = Branches(), torch.randn(2, 3, 16, 8)
    expected = net(images)[0].detach()
    size = _reverse_channels(net, SIZE)
    torch.testing.assert_close(net(images.flip(1))[0].detach(), expected)
    assert (size.mean, size.std) == ((0.3, 0.2, 0.1), (3.0, 2.0, 1.0))


def test_another_first_step_is_refused():
    with refuses(UserError, "no convolution", hint="--input-colour"):
        _reverse_channels(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1)), SIZE)
