"""Our bilinear resize without antialias is OpenCV's, to the last grey level, for any size."""

import hashlib
import platform

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmm.data.resize_opencv import resize_as_opencv
from tests.conftest import examples

SIDES = st.one_of(st.integers(1, 9), st.integers(1, 320), st.sampled_from([64, 128, 256, 384]))


@st.composite
def side_before_and_after(draw):
    after = draw(SIDES)
    before = draw(st.one_of(SIDES, st.sampled_from([after, 2 * after, 3 * after, 4 * after, max(1, after // 2)])))
    return before, after


def pixels_of(kind, height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels if kind == "noise" else np.uint8(255) * (pixels > 127) if kind == "black and white" else pixels | 254


@examples(150)
@given(
    rows=side_before_and_after(),
    columns=side_before_and_after(),
    kind=st.sampled_from(["noise", "black and white", "nearly white"]),
    seed=st.integers(0, 99),
)
@example(rows=(256, 128), columns=(128, 64), kind="noise", seed=0)  # exactly half, in both directions
@example(rows=(256, 128), columns=(129, 64), kind="noise", seed=0)
@example(rows=(1, 128), columns=(1, 64), kind="noise", seed=0)
@example(rows=(300, 1), columns=(150, 1), kind="noise", seed=0)
def test_it_is_opencvs(rows, columns, kind, seed):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: make setup installs it for the tests")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("OpenCV has other code for bilinear resizing on this processor")
    pixels = pixels_of(kind, rows[0], columns[0], seed)
    expected = cv2.resize(pixels, (columns[1], rows[1]), interpolation=cv2.INTER_LINEAR)
    found = resize_as_opencv(pixels, rows[1], columns[1])
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_it_is_what_opencv_gave():
    """Crops of these sizes have this hash as OpenCV 4.14 resizes them: so it is known where OpenCV is missing."""
    digest = hashlib.sha256()
    for height, width in ((300, 150), (250, 118), (31, 17), (128, 64), (127, 64), (64, 33), (1, 1), (2, 200)):
        digest.update(np.ascontiguousarray(resize_as_opencv(pixels_of("noise", height, width), 125, 59)))
    assert digest.hexdigest() == "cf5e231a01fd14ef52eb4252420d81eab8a5e104d9341c2b0d795144a31bf0ab"


def test_rows_and_columns_of_any_array_are_read_where_they_are():
    pixels = pixels_of("noise", 40, 30)
    expected = resize_as_opencv(pixels, 16, 8)
    assert np.array_equal(resize_as_opencv(np.asfortranarray(pixels), 16, 8), expected)
    assert np.array_equal(resize_as_opencv(pixels[::-1].copy()[::-1], 16, 8), expected)
    assert np.array_equal(pixels, pixels_of("noise", 40, 30))
