"""What the clients feed who make one mistake, whatever order of colours, layout and type the file takes."""

import numpy as np
import pytest

from pmm.artifacts.manifest import InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.selftest.crops import selftest_crops
from pmm.selftest.mistakes import Client

SIZE = Preprocessing(height=12, width=6, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
FILES = [
    InputContract(dtype=dtype, layout=layout, colour=colour, normalised_by=by)
    for dtype, by in (("uint8", "graph"), ("float32", "graph"), ("float32", "caller"))
    for layout in ("NHWC", "NCHW")
    for colour in ("rgb", "bgr")
]


def planes(file, fed):
    """[N, 3, H, W], in the file's order."""
    return fed if file.layout == "NCHW" else fed.transpose(0, 3, 1, 2)


def fed_by(file, **more):
    """Mistake -> what is fed of the crops that need no resize, and those."""
    crops = selftest_crops(SIZE)[:2]
    clients = Client(size=SIZE, input=file, **more).mistakes()
    names = [each.name for each in clients]
    assert len(set(names)) == len(names)
    return {each.name: planes(file, each.feed(crops)) for each in clients}, np.stack(crops)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_channels_come_in_the_order_that_the_mistake_is_named_for(file):
    """In fact, and not as seen from the order that the file takes; normalised as what they are taken for."""
    fed, crops = fed_by(file)
    for order in ("rbg", "grb", "gbr", "brg"):
        pixels = np.stack([crops[..., "rgb".index(channel)] for channel in order], 1).astype(np.float64)
        if file.normalised_by == "caller":
            mean, std = (np.array(each)[["rgb".index(channel) for channel in file.colour]]
                         for each in (SIZE.mean, SIZE.std))  # fmt: skip
            pixels = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
        assert np.allclose(fed[order], pixels, atol=1e-5)
    right = planes(file, Client(size=SIZE, input=file).right(list(crops)))
    assert np.array_equal(fed["bgr"].shape, right.shape)
    assert np.array_equal(fed["mirrored"], right[..., ::-1])


@pytest.mark.parametrize("file", FILES, ids=str)
def test_caffe_takes_its_mean_off_pixels_in_either_order(file):
    fed, crops = fed_by(file)
    if file.dtype == "uint8":
        why = Client(size=SIZE, input=file).impossible()
        assert {"caffe", "bgr_caffe", "clip"} <= why.keys() - fed.keys()
        return
    red, green, blue = (crops[..., place].astype(np.float64) for place in range(3))
    rgb, bgr = np.stack([red - 123, green - 117, blue - 104], 1), np.stack([blue - 104, green - 117, red - 123], 1)
    right, other = (rgb, bgr) if file.colour == "rgb" else (bgr, rgb)
    assert np.array_equal(fed["caffe"], right)
    assert np.array_equal(fed["bgr_caffe"], other)


def test_a_file_that_averages_with_the_mirror_image_cannot_be_fed_mirrored_crops():
    file = InputContract()
    assert "mirrored" not in Client(size=SIZE, input=file).impossible()
    client = Client(size=SIZE, input=file, flip_tta=True)
    assert "mirrored" in client.impossible()
    assert "mirrored" not in {each.name for each in client.mistakes()}
