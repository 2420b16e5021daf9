import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.data.crops import load_crops
from pmm.data.mistakes import likely_mistakes
from pmm.data.preprocessing import RESIZES, Preprocessing
from tests.conftest import examples

PLAIN = Preprocessing(height=32, width=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PADDED = dataclasses.replace(PLAIN, padding=(9, 8, 7), antialias=False)
PIXELS = np.random.default_rng(0).integers(0, 256, (41, 29, 3), dtype=np.uint8)


def fed(mistake):
    """What a runner of the contract is given by someone who makes the mistake."""
    return mistake.fed(load_crops(PIXELS, mistake.made))


def by_name(contract):
    return {mistake.name: mistake for mistake in likely_mistakes(contract)}


@pytest.mark.parametrize(
    ("contract", "names"),
    [
        (PLAIN, ["bgr", "resize", "unnormalised"]),
        (PADDED, ["bgr", "resize", "stretched", "unnormalised"]),
        (dataclasses.replace(PADDED, mean=(0, 0, 0), std=(1, 1, 1)), ["bgr", "resize", "stretched"]),
    ],
)
def test_only_what_can_go_wrong_is_a_mistake_and_each_changes_the_crops(contract, names):
    assert list(by_name(contract)) == names
    right = load_crops(PIXELS, contract)
    for mistake in by_name(contract).values():
        assert not np.array_equal(fed(mistake), right), mistake.name
        assert fed(mistake).shape == right.shape
        assert fed(mistake).flags.c_contiguous


def test_what_would_be_black_and_white_is_not_measured():
    of_255 = dataclasses.replace(PLAIN, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    problems = {name: mistake.problem for name, mistake in by_name(of_255).items()}
    assert "2 levels" in problems.pop("unnormalised")
    assert set(problems.values()) == {""}
    assert not any(mistake.problem for mistake in by_name(PADDED).values())


def test_swapped_channels():
    assert np.array_equal(fed(by_name(PLAIN)["bgr"]), load_crops(PIXELS[..., ::-1].copy(), PLAIN))


@pytest.mark.parametrize(("interpolation", "antialias"), list(RESIZES))
def test_the_other_usual_resize(interpolation, antialias):
    contract = dataclasses.replace(PADDED, interpolation=interpolation, antialias=antialias)
    mistake = by_name(contract)["resize"]
    other = dataclasses.replace(contract, interpolation="bilinear", antialias=not antialias)
    assert np.array_equal(fed(mistake), load_crops(PIXELS, other))
    assert mistake.description == f"{other.filter_name}, not {contract.filter_name}"
    assert {other.filter_name.split("'")[0], contract.filter_name.split("'")[0]} == {"PIL", "OpenCV"}


def test_stretched_where_it_is_to_be_padded():
    expected = load_crops(PIXELS, dataclasses.replace(PADDED, padding=None))
    assert np.array_equal(fed(by_name(PADDED)["stretched"]), expected)


STATISTICS = st.tuples(st.floats(0.3, 0.6), st.floats(0.3, 0.6), st.floats(0.3, 0.6))


@examples(50)
@given(mean=STATISTICS, std=st.tuples(*[st.floats(0.1, 0.3)] * 3))
def test_the_network_sees_pixels_that_nobody_normalised_within_half_a_level(mean, std):
    contract = dataclasses.replace(PLAIN, mean=mean, std=std)
    mistake, crops = by_name(contract)["unnormalised"], load_crops(PIXELS, contract)
    expected = crops.transpose(0, 3, 1, 2) / np.float32(255)
    half = 0.5 / 255 / np.array(std)[:, None, None]
    assert (np.abs(contract.normalise(mistake.fed(crops)) - expected) <= half + 1e-5).all()
    assert np.allclose(mistake.made.normalise(crops), expected, atol=1e-6)
