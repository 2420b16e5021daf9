"""With --device cpu no command uses a GPU that is there, or looks for one."""

import os

import pytest
import torch

from pmm.artifacts.checkpoint import load
from pmm.utils import hardware
from tests.conftest import run_here


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as torch's Adam sees one: visible unless CUDA_VISIBLE_DEVICES is empty; whatever would use it fails."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch has no CUDA")

    def used(*args, **words):
        raise AssertionError("CUDA was called")

    def count():
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == "", "CUDA was called"
        return 0

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", count)
    for name in ("_cuda_init", "_accelerator_getStream", "_cuda_isCurrentStreamCapturing"):
        monkeypatch.setattr(torch._C, name, used)
    monkeypatch.setattr(torch.Tensor, "pin_memory", used)
    monkeypatch.setattr(hardware, "cuda_library", used)
    hardware.nvidia_gpus.cache_clear()
    hardware.driver_version.cache_clear()
    yield
    hardware.nvidia_gpus.cache_clear()
    hardware.driver_version.cache_clear()


def test_the_stand_in_is_met_by_an_optimizer_as_a_gpu_is(gpu, monkeypatch):
    weight = torch.zeros(1, requires_grad=True)
    weight.sum().backward()
    with pytest.raises(AssertionError, match="CUDA was called"):
        torch.optim.Adam([weight]).step()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.optim.Adam([weight]).step()


def test_no_command_on_the_cpu_opens_cuda(gpu, people, tmp_path):
    out, on_cpu = tmp_path / "run", ("--device", "cpu")
    flags = ("--preset", "tiny", "--root", people, "--epochs", "1", "--workers", "1", *on_cpu)
    data = ("--dataset", "synthetic", "--root", people)
    for words in (
        ("train", *flags, "--out", out),
        ("train", "--resume", "--out", out, *on_cpu),
        ("evaluate", out / "best.pth", *data, *on_cpu),
        ("embed", out / "best.pth", people / "query", "-o", tmp_path / "gallery", *on_cpu),
    ):
        done = run_here("-m", "pmm", *words, PMM_FAST="1")
        assert done.returncode == 0, done.stderr
    assert load(out / "last.pth")["rng"]["cuda"] == []
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
