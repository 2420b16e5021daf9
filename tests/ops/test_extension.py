"""The compiled kernels as a part of the package: found or not, required or not, whole or broken."""

import os
import re
import shutil
import subprocess

import pytest
import torch

from pmm.ops import _extension, hard_mix
from pmm.training.announce import describe_kernels
from pmm.utils import build_info as facts
from pmm.utils import environment
from pmm.utils.hardware import Gpu
from tests.conftest import ROOT


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Sets the file that is taken for the compiled kernels."""
    monkeypatch.setattr(_extension, "missing", _extension.missing.__wrapped__)

    def be(path):
        monkeypatch.setattr(facts, "LIBRARY", path)
        monkeypatch.setattr(_extension, "LIBRARY", path)

    return be


def test_they_are_compiled_here_and_from_these_sources():
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    found = facts.build_info()
    assert found["compiled"]
    assert re.fullmatch("[0-9a-f]{12}", found["sources"])
    assert found["compiler"] in facts.describe_build()
    assert _extension.kernels(torch.device("cpu")) is not None


def test_without_them_plain_torch_serves_unless_they_are_required(library, tmp_path, monkeypatch):
    library(tmp_path / "nowhere.so")
    assert facts.build_info() == {"compiled": False}
    assert "plain torch" in facts.describe_build()
    assert _extension.kernels(torch.device("cpu")) is None
    mixed, _ = hard_mix(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), torch.tensor([0]), (1, 1), 1)
    assert mixed.eq(1).all()
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(RuntimeError, match=r"PMM_REQUIRE_EXT=1, but the kernels .* not compiled; run make setup"):
        hard_mix(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), torch.tensor([0]), (1, 1), 1)


def test_a_library_that_does_not_load_is_said_once_and_plain_torch_serves(library, tmp_path, monkeypatch):
    broken = tmp_path / "_C.so"
    broken.write_bytes(facts.LIBRARY.read_bytes().replace(b"\x7fELF", b"\x7fBAD", 1))
    library(broken)
    with pytest.warns(UserWarning, match="do not load with torch .* going on with plain torch"):
        assert _extension.kernels(torch.device("cpu")) is None
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(RuntimeError, match="PMM_REQUIRE_EXT=1, but the kernels do not load"):
        _extension.kernels(torch.device("cpu"))


def test_kernels_without_cuda_say_so_for_a_gpu(library, monkeypatch):
    monkeypatch.setattr(facts, "build_info", lambda: {"compiled": True, "cuda": None})
    library(facts.LIBRARY)
    assert _extension.kernels(torch.device("cuda")) is None
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(RuntimeError, match="built without CUDA; rebuild with PMM_BUILD_CUDA=1"):
        _extension.kernels(torch.device("cuda"))


def test_kernels_for_another_gpu_are_not_launched_on_this_one(built_with, monkeypatch):
    """Of two GPUs the one that they are built for has them; the other has plain torch, before its first launch."""
    built_with(compiler="g++", cuda="13.0", architectures=["8.6"], sources="0")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    for module in (_extension, environment):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: (Gpu("NVIDIA T4", "7.5"), Gpu("NVIDIA L4", "8.9")))
        monkeypatch.setattr(module, "driver_version", lambda: "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    first, second, current = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda")
    assert _extension.kernels(first) is None
    assert _extension.kernels(second) is _extension.kernels(current) is torch.ops.pmm_kernels
    assert "plain torch on cuda: the kernels were built for GPUs of 8.6, not for 7.5" in describe_kernels(first)
    assert [line for line in environment.problems() if "kernels" in line] == [
        "NVIDIA T4: " + facts.not_built_for("7.5", "13.0")
    ]
    monkeypatch.setenv("PMM_REQUIRE_EXT", "1")
    with pytest.raises(RuntimeError, match=r"PMM_REQUIRE_EXT=1, but the kernels were built for GPUs of 8\.6"):
        _extension.kernels(first)


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_setup_installs_again_what_is_gone_or_was_built_otherwise(tmp_path):
    libraries = ("pmm/_C.so", "pmm/_search.so")
    for name in ("pyproject.toml", "setup.py", "constraints.txt", *libraries, ".venv/.installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("0\n")

    def made(*words, **env):
        clean = {k: v for k, v in os.environ.items() if k not in ("PMM_BUILD_CUDA", "CXX", "MAKEFLAGS")}
        command = [shutil.which("make"), "-n", "-C", tmp_path, "-f", ROOT / "Makefile", *words, "setup"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **env}).stdout

    def installs(path=os.environ["PATH"], **env):
        return "pip install" in made(PATH=path, **env)

    assert not installs()
    for device, build in (("nvidiactl", "0"), ("nvidia3", "auto")):  # in a container the first GPU may be the fourth
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / device).touch()
        assert f"echo {build} > " in made("-B", f"DEVICES={tmp_path}/dev")
    assert not installs(PMM_BUILD_CUDA="0")
    assert installs(PMM_BUILD_CUDA="1")
    program(tmp_path / "bin/g++", "")
    for name in libraries:
        (tmp_path / name).unlink()
        assert installs(str(tmp_path / "bin"))
        assert not installs(str(tmp_path / "no compiler"))
        (tmp_path / name).touch()
