"""The statistics that a client compares its own crops with: those of the pixels, of every channel on its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmm.data import measure_crops
from pmm.data.crop_statistics import CropStatistics
from pmm.data.crops import load_crops
from pmm.data.measure_crops import crop_statistics, dataset_statistics
from pmm.data.preprocessing import Resize
from pmm.data.readers import read_dataset
from pmm.utils.errors import InvalidValue
from tests.refusals import refuses

SIZE = Resize(height=16, width=8, padding=(10, 20, 30))


@given(seed=st.integers(0, 99), count=st.integers(1, 5), broken=st.integers(0, 2))
def test_they_are_those_of_the_pixels_that_can_be_read(tmp_path_factory, seed, count, broken):
    folder, draw = tmp_path_factory.mktemp("crops"), np.random.default_rng(seed)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        shape = (*draw.integers(5, 40, 2), 3)
        Image.fromarray((draw.integers(0, 256, shape) * (1.0, 0.5, 0.1)).astype(np.uint8)).save(path)
    pixels = load_crops(paths, SIZE).reshape(-1, 3).astype(float)
    for number in range(broken):
        (folder / f"broken-{number}.png").write_bytes(b"none")
    found = crop_statistics([*(folder / f"broken-{number}.png" for number in range(broken)), *paths], SIZE)
    np.testing.assert_allclose([found.mean, found.std], [pixels.mean(0), pixels.std(0)], atol=0.0051)
    assert found.crops == count


def test_the_sample_is_spread_over_all(people, monkeypatch):
    paths = [sample.path for sample in read_dataset("market1501", people).train]
    whole = crop_statistics(paths, SIZE)
    monkeypatch.setattr(measure_crops, "SAMPLE", 9)
    some = crop_statistics(paths, SIZE)
    assert (whole.crops, some.crops) == (min(128, len(paths)), 9)
    assert max(abs(a - b) for a, b in zip(whole.mean, some.mean, strict=True)) < 40
    assert some == crop_statistics([paths[k] for k in np.linspace(0, len(paths) - 1, 9).astype(int)], SIZE)


def test_nothing_is_said_where_nothing_can_be_read(people, tmp_path):
    assert crop_statistics([], SIZE) is None
    assert crop_statistics([tmp_path / "none.jpg"], SIZE) is None
    assert dataset_statistics("", str(people), SIZE) is None
    assert dataset_statistics("market1501", str(tmp_path), SIZE) is None
    assert dataset_statistics("market1501", str(people), SIZE).crops > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", (0.0, 0.0, 256.0)), ("std", (-1.0, 0.0, 0.0)), ("crops", 0), ("mean", (float("nan"),) * 3)],
)
def test_what_no_pixels_have_is_refused(name, value):
    with refuses(InvalidValue, name=name, value=value):
        CropStatistics(**{"mean": (1.0, 1.0, 1.0), "std": (1.0, 1.0, 1.0), "crops": 1, name: value})
