"""Where the compiler of the kernels is looked for, and what make setup asks before it installs."""

import importlib
import sys

import pytest

from pmm.utils import cuda_toolkit
from pmm.utils.cuda_versions import GpuLibrary
from tests.conftest import run_python


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """Makes a toolkit, or torch's packages, in a folder of its own; nothing else is here."""
    for name in (*cuda_toolkit.VARIABLES, "PMM_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(cuda_toolkit, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    (tmp_path / "site").mkdir()

    def make(name, nvcc=True, library="lib64"):
        folder = tmp_path / name
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        if nvcc:
            (folder / "bin/nvcc").touch(mode=0o755)
        if library:
            (folder / library).mkdir(exist_ok=True)
            (folder / library / "libcudart_static.a").touch()
        importlib.invalidate_caches()
        return folder

    return make


def test_the_named_one_or_the_usual_one_or_that_on_the_path_or_of_the_packages(toolkits, tmp_path, monkeypatch):
    assert cuda_toolkit.find_toolkit() is None
    packages = toolkits("site/nvidia/cu13", library="lib")  # as the wheels lay it out
    toolkits("site/nvidia/cu12", nvcc=False)
    assert cuda_toolkit.find_toolkit() == packages
    on_path = toolkits("other")
    (tmp_path / "path").mkdir()
    (tmp_path / "path/nvcc").symlink_to(on_path / "bin/nvcc")
    assert cuda_toolkit.find_toolkit() == on_path
    usual = toolkits("usual")
    assert cuda_toolkit.find_toolkit() == usual
    (usual / "lib64/libcudart_static.a").unlink()  # it cannot link
    assert cuda_toolkit.find_toolkit() == on_path
    monkeypatch.setenv("CUDA_PATH", str(usual))
    assert cuda_toolkit.find_toolkit() is None
    monkeypatch.setenv("CUDA_HOME", str(packages))
    assert cuda_toolkit.find_toolkit() == packages


def test_what_torchs_packages_lack(toolkits, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "installed_version", lambda name: "13.0.3.0" if name == "cuda-toolkit" else None)
    assert cuda_toolkit.missing_nvcc() == ""  # a torch for CUDA 12 has no such folder
    folder = toolkits("site/nvidia/cu13", nvcc=False, library="lib")
    assert cuda_toolkit.missing_nvcc() == "cuda-toolkit[nvcc,nvvm,crt]==13.0.3.0"
    with monkeypatch.context() as patch:
        patch.setenv("PMM_BUILD_CUDA", "0")
        assert cuda_toolkit.missing_nvcc() == ""
    (folder / "bin/nvcc").touch()
    assert cuda_toolkit.missing_nvcc() == ""


PINNED = GpuLibrary("torch", "2.14.1", "13.0.3")


@pytest.mark.parametrize(
    ("driver", "installed", "build", "fits"),
    [
        ("12.8", None, "auto", False),
        ("12.8", GpuLibrary("torch", "2.14.1+cu128", "12.8"), "auto", True),
        ("12.8", GpuLibrary("torch", "2.14.1", "13.0"), "1", False),
        ("12.8", None, "0", True),
        ("13.0", None, "auto", True),
        ("", None, "auto", True),
    ],
)
def test_make_setup_refuses_a_driver_older_than_torch(monkeypatch, capsys, driver, installed, build, fits):
    monkeypatch.setenv("PMM_BUILD_CUDA", build)
    monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: driver)
    monkeypatch.setattr(cuda_toolkit, "gpu_libraries", lambda: [installed] if installed else [])
    monkeypatch.setattr(cuda_toolkit, "_pinned_torch", lambda: PINNED)
    assert cuda_toolkit.main(["driver"]) == int(not fits)
    said = capsys.readouterr().err
    assert bool(said) == (not fits)
    if not fits:
        assert len(said.splitlines()) == 1
        for fact in ("torch 2.14.1", "CUDA 12.8 at most", "580", "for CUDA 12", "make setup PMM_BUILD_CUDA=0"):
            assert fact in said


def test_the_pinned_torch_is_read_from_the_constraints():
    pinned = cuda_toolkit._pinned_torch()
    assert pinned is not None
    assert (pinned.name, pinned.major >= 13) == ("torch", True)


def test_make_setup_asks_with_the_standard_library_alone():
    for word in ("driver", "nvcc"):
        done = run_python("-S", "-m", "pmm.utils.cuda_toolkit", word, PMM_BUILD_CUDA="0")
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
