"""Every test of an op runs on every implementation: the plain-torch reference, the kernels compiled for the CPU, and
those on a GPU. With PMM_TEST_KERNELS=LIBRARY (see tests/slow/test_device_code.py) it runs once, on the CUDA kernels
executed by the CPU.
"""

import os
import shutil

import pytest
import torch

from pmm.kernels import build_info
from pmm.ops import _extension

EMULATED = os.environ.get("PMM_TEST_KERNELS")
PLACES = ["emulated"] if EMULATED else ["reference", "compiled", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="package", params=PLACES)
def place(request):
    """The implementation that the ops use while this test runs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(_extension, "kernels", lambda device: None)
        elif request.param == "emulated":
            from tests.ops.emulated import Emulated

            emulated = Emulated(EMULATED)
            patch.setattr(_extension, "kernels", lambda device: emulated)
        else:
            if not build_info()["compiled"] and not shutil.which("g++"):
                pytest.skip("no C++ compiler here, so no compiled kernels")
            patch.setenv("PMM_REQUIRE_EXT", "1")
        yield request.param


@pytest.fixture(scope="package")
def device(place):
    """Where the tensors of the test belong."""
    return torch.device("cuda" if place == "cuda" else "cpu")
