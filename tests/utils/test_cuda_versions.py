"""Which libraries fit the driver and each other: read from packages that lie there as pip leaves them."""

import sys

import pytest

from pmm.runtime import eager, trt_variant
from pmm.utils import cuda_versions, environment
from pmm.utils.cuda_versions import GpuLibrary, advice, gpu_libraries, misfits, side_by_side
from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.hardware import Gpu
from tests.refusals import refuses

# as torch 2.14.1 and onnxruntime-gpu 1.31.1 have them
TORCH = (
    "from typing import Optional\n\n__version__ = '{}'\ndebug = False\ncuda: Optional[str] = {}\n"
    "hip: Optional[str] = None\n"
)
ORT = "package_name = 'onnxruntime-gpu'\n__version__ = '{}'\ncuda_version = '{}'\n"


class Machine:
    """Packages in a folder of their own, and a driver."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.patch = folder, monkeypatch
        monkeypatch.setattr(sys, "path", [str(folder)])

    def package(self, name, version, file="", text=""):
        info = self.folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
        if file:
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def torch(self, cuda, version="2.11.0"):
        quoted = f"'{cuda}'" if cuda else "None"
        self.package("torch", version, "torch/version.py", TORCH.format(version, quoted))

    def ort(self, cuda, version="1.31.1"):
        self.package(
            "onnxruntime_gpu", version, "onnxruntime/capi/build_and_package_info.py", ORT.format(version, cuda)
        )

    def tensorrt(self, major, name="tensorrt", version="11.4.0.106"):
        for each in (name, f"{name}_cu{major}", f"{name}_cu{major}_libs", f"{name}_cu{major}_bindings"):
            if not (self.folder / f"{each}-{version}.dist-info").exists():
                self.package(each, version)

    def driver(self, cuda, *gpus):
        for module in (cuda_versions, trt_variant):
            self.patch.setattr(module, "driver_version", lambda: cuda)
        self.patch.setattr(cuda_versions, "nvidia_gpus", lambda: gpus)


@pytest.fixture
def here(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch)
    machine.driver("13.0", Gpu("NVIDIA L4", "8.9"))
    return machine


def test_all_of_one_cuda_is_no_misfit(here):
    here.torch("13.0")
    here.ort("13.0")
    here.tensorrt(13)
    here.tensorrt(13, "tensorrt_rtx", "1.7.1.116")
    assert gpu_libraries() == [
        GpuLibrary("torch", "2.11.0", "13.0"),
        GpuLibrary("onnxruntime-gpu", "1.31.1", "13.0"),
        GpuLibrary("tensorrt", "11.4.0.106", "13"),
        GpuLibrary("tensorrt-rtx", "1.7.1.116", "13"),
    ]
    assert side_by_side() == {
        "driver": "13.0", "torch": "13.0", "onnxruntime-gpu": "13.0", "tensorrt": "13", "tensorrt-rtx": "13"
    }  # fmt: skip
    assert misfits() == []
    here.driver("14.2", Gpu("NVIDIA L4", "8.9"))  # a driver serves what came before it
    assert misfits() == []


def test_nothing_installed_and_no_driver(here):
    here.driver("")
    assert side_by_side() == {"driver": "none"}
    assert misfits() == []


def test_minor_versions_fit(here):
    here.driver("12.2", Gpu("NVIDIA L4", "8.9"))
    here.torch("12.8")
    here.ort("12.6", "1.26.0")
    assert misfits() == []


def test_a_driver_too_old_for_some(here):
    here.driver("12.4", Gpu("NVIDIA L4", "8.9"))
    here.torch("12.8")
    here.ort("13.0")
    here.tensorrt(13)
    (misfit,) = misfits()
    assert misfit.names == ("onnxruntime-gpu", "tensorrt")
    for fact in (
        "onnxruntime-gpu 1.31.1 is built for CUDA 13.0",
        "tensorrt 11.4.0.106 is built for CUDA 13",
        "CUDA 12.4 at most",
        "driver to 580 or later",
        "pip uninstall -y tensorrt tensorrt-cu13 tensorrt-cu13-libs tensorrt-cu13-bindings && ",
        '&& pip install "onnxruntime-gpu[cuda,cudnn]>=1.23,<1.27" tensorrt-cu12',
    ):
        assert fact in misfit.text
    assert "torch" not in misfit.text
    assert advice("tensorrt") == advice("onnxruntime-gpu") == misfit.text
    assert advice("torch") == ""


def test_a_torch_too_new_for_the_driver_is_got_elsewhere(here):
    """Its wheels for CUDA 12 are not on the ordinary registry."""
    here.driver("12.4", Gpu("NVIDIA L4", "8.9"))
    here.torch("13.0")
    (misfit,) = misfits()
    assert "or pip uninstall -y torch torchvision, then torch and torchvision for CUDA 12 by the" in misfit.text
    assert "pip install" not in misfit.text
    here.driver("11.4", Gpu("NVIDIA L4", "8.9"))
    (misfit,) = misfits()
    assert misfit.text.endswith("CUDA 11.4 at most: update the NVIDIA driver to 580 or later")


@pytest.mark.parametrize(
    ("torch", "ort", "mend"),
    [
        ("12.8", "13.0", 'pip install "onnxruntime-gpu[cuda,cudnn]>=1.23,<1.27"'),
        ("13.0", "12.6", 'pip install "onnxruntime-gpu[cuda,cudnn]>=1.28"'),
    ],
)
def test_torch_and_onnx_runtime_of_two_cudas(here, torch, ort, mend):
    here.torch(torch)
    here.ort(ort)
    here.tensorrt(12)  # shares no library with them
    (misfit,) = misfits()
    assert misfit.names == ("torch", "onnxruntime-gpu")
    for fact in (f"torch 2.11.0 is built for CUDA {torch}", f"built for CUDA {ort}", "libcudnn.so.9"):
        assert fact in misfit.text
    assert misfit.text.endswith(mend)


def test_two_builds_of_tensorrt(here):
    here.tensorrt(12)
    here.tensorrt(13)
    assert side_by_side()["tensorrt"] == "12 and 13"
    (misfit,) = misfits()
    assert "CUDA 12 and 13" in misfit.text
    assert misfit.text.endswith("tensorrt-cu13-bindings && pip install tensorrt-cu13")


def test_a_torch_without_cuda_beside_a_gpu(here, monkeypatch):
    here.torch("", "2.11.0+cpu")
    (misfit,) = misfits()
    assert misfit.text.endswith("a GPU: pip uninstall -y torch torchvision && pip install torch torchvision")
    monkeypatch.setattr(eager.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(eager, "check_cuda_after_fork", lambda: None)
    with refuses(BackendUnavailable, "--device cuda:1", hint=misfit.text):
        eager.torch_device("cuda:1")
    here.driver("13.0")
    assert misfits() == []
    with refuses(BackendUnavailable, hint="check the driver"):
        eager.torch_device("cuda")


@pytest.mark.parametrize("name", ["m.plan: tensorrt 11.4.0", "m.onnx: tensorrt 11.4.0"])
def test_tensorrt_that_cannot_start_on_an_old_driver(here, name):
    here.driver("12.4", Gpu("NVIDIA L4", "8.9"))
    here.tensorrt(13)

    class Logger:
        native = None

        def take(self, error):
            return "CUDA initialization failure with error: 35"

    def nothing(logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    facts = ("cannot start", "error: 35", "driver serves CUDA 12.4", "pip install tensorrt-cu12")
    with refuses(UserError, name, *facts):
        trt_variant.start(nothing, Logger(), name)
    with refuses(UserError, "rtx 1.7.1", hint="update the driver, or install the release"):
        trt_variant.start(nothing, Logger(), "m.onnx: rtx 1.7.1")


def test_it_is_a_problem_of_the_machine(here):
    here.torch("12.8")
    here.ort("13.0")
    (problem,) = environment.problems()
    assert "libcudnn.so.9" in problem
