import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.data.preprocessing import RESIZES, Preprocessing, Resize, preprocessing_of
from pmm.presets import preset
from pmm.utils.errors import ConflictingOptions, InvalidValue
from tests.conftest import examples
from tests.refusals import refuses

IMAGENET = Preprocessing(height=256, width=128, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def test_normalisation_by_hand():
    preprocessing = preprocessing_of(preset("tiny"))
    crops = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = (crops.astype(np.float64) / 255 - preprocessing.mean) / preprocessing.std
    found = preprocessing.normalise(crops)
    assert found.shape == (2, 3, 5, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), atol=2e-6)


SIDES = st.integers(1, 500)


@examples(400)
@given(height=SIDES, width=SIDES, crop_height=SIDES, crop_width=SIDES)
def test_with_padding_the_ratio_is_kept_to_half_a_pixel(height, width, crop_height, crop_width):
    size = Resize(height=height, width=width, padding=(0, 0, 0))
    found = size.content_size(crop_height, crop_width)
    scale = min(Fraction(height, crop_height), Fraction(width, crop_width))
    for side, before, most in zip(found, (crop_height, crop_width), (height, width), strict=True):
        assert 1 <= side <= most
        assert side == max(1, round(before * scale))  # of fractions: exact, a half to the even number
    assert height == found[0] or width == found[1]
    assert dataclasses.replace(size, padding=None).content_size(crop_height, crop_width) == (height, width)


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ((256, 128), (300, 150), (256, 128)),
        ((256, 128), (300, 100), (256, 85)),
        ((256, 128), (100, 100), (128, 128)),
        ((4, 4), (8, 5), (4, 2)),  # 2.5
        ((4, 4), (8, 7), (4, 4)),  # 3.5
        ((256, 128), (1000, 1), (256, 1)),
        ((256, 128), (1, 1000), (1, 128)),
    ],
)
def test_sizes_within_the_padding_by_hand(size, crop, expected):
    assert Resize(height=size[0], width=size[1], padding=(0, 0, 0)).content_size(*crop) == expected


def test_it_is_described_in_words():
    assert IMAGENET.describe() == "256x128, PIL's bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    other = dataclasses.replace(IMAGENET, antialias=False, padding=(114, 0, 7), mean=(0, 0, 0), std=(1, 1, 1 / 255))
    for fact in ("OpenCV's bilinear", "padded with 114 0 7", "mean 0 0 0", "std 1 1 0.00392157"):
        assert fact in other.describe()
    assert IMAGENET.facts()["padding"] == "none (stretched)"
    assert other.facts() == dataclasses.asdict(other)
    words = {Resize(height=1, width=1, interpolation=i, antialias=a).describe() for i, a in RESIZES}
    assert len(words) == len(RESIZES)


@pytest.mark.parametrize(
    ("field", "value", "fact"),
    [
        ("height", 0, "1 or more"),
        ("width", -1, "1 or more"),
        ("interpolation", "bicubik", "did you mean bicubic?"),
        ("padding", (0, 0, 256), "0 to 255"),
        ("padding", (-1, 0, 0), "0 to 255"),
        ("padding", (0, 0), "red, green and blue"),
        ("mean", (0, float("nan"), 0), "finite"),
        ("std", (1, 0, 1), "above 0"),
        ("std", (1, float("inf"), 1), "above 0"),
    ],
)
def test_what_cannot_be_is_refused(field, value, fact):
    with refuses(InvalidValue, fact, name=field, value=value):
        dataclasses.replace(IMAGENET, **{field: value})


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_what_has_no_one_definition_is_refused(interpolation):
    with refuses(
        ConflictingOptions, f"interpolation {interpolation} needs antialias", options=("interpolation", "antialias")
    ):
        dataclasses.replace(IMAGENET, interpolation=interpolation, antialias=False)
