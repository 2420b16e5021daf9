"""What is said of a network's images, as a contract for RGB crops whose pixels are in 0..1."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pmm.adoption.image_options import ImageOptions
from pmm.config import IMAGENET_MEAN, IMAGENET_STD
from pmm.utils.errors import ConflictingOptions, InvalidValue
from tests.conftest import examples
from tests.refusals import refuses


@examples(40)
@given(
    st.tuples(*[st.floats(-2, 2)] * 3),
    st.tuples(*[st.floats(0.01, 2)] * 3),
    st.sampled_from([None, "rgb", "bgr"]),
    st.sampled_from([None, "1/255", "1"]),
)
def test_the_contract_normalises_as_the_network_was_trained(mean, std, colour, scale):
    if scale == "1":
        mean, std = (tuple(255 * value for value in each) for each in (mean, std))
        assume(max(map(abs, mean)) > 1 or not any(mean))
    crops = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    options = ImageOptions(mean=mean, std=std, colour=colour, scale=scale)
    found = options.preprocessing(5, 4).normalise(crops)
    theirs = crops[..., ::-1] if colour == "bgr" else crops
    expected = ((theirs * (1.0 if scale == "1" else 1 / 255) - mean) / std).transpose(0, 3, 1, 2)
    given_to_them = found[:, ::-1] if colour == "bgr" else found
    np.testing.assert_allclose(given_to_them, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("colour", ["rgb", "bgr", None])
def test_imagenets_statistics_are_those_of_red_green_and_blue(colour):
    size = ImageOptions(colour=colour).preprocessing(8, 4)
    assert (size.mean, size.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_all_that_is_not_said_is_listed():
    assert len(ImageOptions().assumptions()) == 6
    said = ImageOptions(
        mean=(0, 0, 0),
        std=(1, 1, 1),
        colour="rgb",
        scale="1",
        interpolation="bilinear",
        antialias=False,
        padding=(0, 0, 0),
    )
    assert said.assumptions() == []
    assert ImageOptions(antialias=False, scale="1/255").assumptions() == [
        "--colour rgb", "--mean and --std ImageNet's", "--interpolation bilinear", "stretched without --padding",
    ]  # fmt: skip


def test_half_of_a_contract_is_refused():
    with refuses(ConflictingOptions, options=("mean", "std")):
        ImageOptions(mean=(0, 0, 0))
    with refuses(ConflictingOptions, options=("std", "mean")):
        ImageOptions(std=(1, 1, 1))
    with refuses(ConflictingOptions, options=("scale", "mean", "std"), hint="mean 0 0 0 std 1 1 1"):
        ImageOptions(scale="1")
    with refuses(InvalidValue, name="std"):
        ImageOptions(height=8, width=4, mean=(0, 0, 0), std=(0, 1, 1))


OF_BYTES = {"mean": (123.675, 116.28, 103.53), "std": (58.4, 57.1, 57.4)}
OF_UNIT = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@pytest.mark.parametrize(
    ("said", "fact"),
    [
        (OF_BYTES, "add scale 1"),
        (OF_BYTES | {"scale": "1/255"}, "add scale 1"),
        (OF_BYTES | {"mean": (0, 0, 0)}, "add scale 1"),
        (OF_UNIT | {"scale": "1"}, "leave scale 1 out"),
    ],
)
def test_statistics_of_the_other_scale_are_refused(said, fact):
    with refuses(ConflictingOptions, options=("mean", "std", "scale"), hint=fact):
        ImageOptions(**said)
    ImageOptions(**said | {"scale": "1/255" if said.get("scale") == "1" else "1"})
