"""What can be said of the crops that an exported file is fed."""

import pytest

from pmm.config import IMAGENET_MEAN, IMAGENET_STD
from pmm.data.preprocessing import Preprocessing
from pmm.export.options import ExportOptions
from pmm.utils.errors import ConflictingOptions, InvalidValue
from tests.refusals import refuses

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("kind", ["uint8", "float255"])
def test_a_graph_that_normalises_takes_no_statistics(kind):
    with refuses(ConflictingOptions, kind, options=("--input-mean", "--input")):
        ExportOptions(input=kind, input_mean=HALF, input_std=HALF)


@pytest.mark.parametrize("half", [{"input_mean": HALF}, {"input_std": HALF}])
def test_statistics_are_given_whole(half):
    with refuses(ConflictingOptions, "--input-mean", "--input-std"):
        ExportOptions(input="float", **half)


@pytest.mark.parametrize(
    ("flag", "statistics"),
    [("--input-mean", {"input_mean": (123.7, 116.3, 103.5)}), ("--input-std", {"input_std": (58.4, 57.1, 57.4)})],
)
def test_statistics_of_pixels_up_to_255_are_refused(flag, statistics):
    with refuses(InvalidValue, "255", name=flag):
        ExportOptions(input="float", **{"input_mean": HALF, "input_std": HALF, **statistics})


def test_a_deviation_of_nothing_is_refused():
    size = Preprocessing(height=8, width=4, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    options = ExportOptions(input="float", input_mean=HALF, input_std=(0.5, 0.0, 0.5))
    with refuses(InvalidValue, name="std"):
        options.fed(size)


def test_what_a_caller_normalises_by_is_in_the_contract():
    size = Preprocessing(height=8, width=4, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic")
    assert ExportOptions(input="float").fed(size) == size
    fed = ExportOptions(input="float", input_mean=HALF, input_std=HALF).fed(size)
    assert (fed.mean, fed.std, fed.interpolation) == (HALF, HALF, "bicubic")
