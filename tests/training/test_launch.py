"""A machine whose GPU torch cannot use: training stops before it has written anything."""

import pytest

from pmm.training import launch
from pmm.utils import cuda_versions
from pmm.utils.cuda_versions import GpuLibrary
from pmm.utils.hardware import Gpu
from tests.conftest import assert_one_line_error, run_here

CARD = Gpu("NVIDIA L4", "8.9")


@pytest.fixture
def unusable(monkeypatch):
    """A driver for CUDA 12.8 with a GPU, and a torch for CUDA 13, which sees no GPU then."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(launch, "nvidia_gpus", lambda: (CARD,))
    monkeypatch.setattr("pmm.utils.hardware.nvidia_gpus", lambda: (CARD,))
    monkeypatch.setattr(cuda_versions, "driver_version", lambda: "12.8")
    monkeypatch.setattr(cuda_versions, "gpu_libraries", lambda: [GpuLibrary("torch", "2.14.1", "13.0")])


def test_a_driver_older_than_torch_stops_the_run_at_once(unusable, people, tmp_path):
    done = run_here("-m", "pmm", "train", "--root", people, "--out", tmp_path / "run", "--epochs", "1")
    facts = (CARD.name, "torch 2.14.1 is built for CUDA 13.0", "CUDA 12.8 at most", "580", "--device cpu")
    assert_one_line_error(done, *facts)
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_torch_does_not_see_for_another_reason(unusable, people, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_versions, "driver_version", lambda: "13.0")
    done = run_here("-m", "pmm", "train", "--root", people, "--out", tmp_path / "run")
    assert_one_line_error(done, CARD.name, "pmm info", "--device cpu")
