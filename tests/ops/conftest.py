"""Every test of an op runs on every implementation: the plain-torch reference, the kernels compiled for the CPU, and
those on a GPU. What torch sees alike on each, or what compares with the reference, runs on the reference in full only
(`ONE_PLACE`).

tests/slow/test_op_suite.py runs the same tests on two more, one at a time: PMM_TEST_KERNELS names a library of the CUDA
kernels that the CPU executes, PMM_TEST_LIBRARY a build of the package's own library, both with sanitizers.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from pmm.ops import _extension
from pmm.utils import build_info

PLACES = ["reference", "compiled", pytest.param("cuda", marks=pytest.mark.gpu)]
if "PMM_TEST_KERNELS" in os.environ:
    PLACES = ["emulated"]
elif "PMM_TEST_LIBRARY" in os.environ:
    PLACES = ["sanitized"]
REPEATED = ("reference",) if build_info.build_info()["compiled"] else ()
ONE_PLACE = [pytest.param(place, marks=pytest.mark.full) if place in REPEATED else place for place in PLACES]


@pytest.fixture(scope="module", params=PLACES)
def place(request):
    """The implementation that the ops use while this test runs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(_extension, "kernels", lambda device: None)
        elif request.param == "emulated":
            from tests.ops.emulated import Emulated

            emulated = Emulated(os.environ["PMM_TEST_KERNELS"])
            patch.setattr(_extension, "kernels", lambda device: emulated)
        else:
            if request.param == "sanitized":
                for module in (build_info, _extension):
                    patch.setattr(module, "LIBRARY", Path(os.environ["PMM_TEST_LIBRARY"]))
            if not build_info.build_info()["compiled"] and not shutil.which("g++"):
                pytest.skip("no C++ compiler here, so no compiled kernels")
            patch.setenv("PMM_REQUIRE_EXT", "1")
        yield request.param


@pytest.fixture
def threads():
    """Several threads, also where the processes of the tests are given one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def device(place):
    """Where the tensors of the test belong."""
    return torch.device("cuda" if place == "cuda" else "cpu")
