"""The compiled kernels as a part of the package: found or not, required or not, whole or broken."""

import os
import re
import shutil
import subprocess

import pytest
import torch

from pmm.ops import _extension, hard_mix
from pmm.utils import build_info as facts
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


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_setup_installs_again_what_is_gone_or_was_built_otherwise(tmp_path):
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "pmm/_C.so", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("0\n")

    def installs(path=os.environ["PATH"], **env):
        clean = {k: v for k, v in os.environ.items() if k not in ("PMM_BUILD_CUDA", "CXX", "MAKEFLAGS")}
        words = [shutil.which("make"), "-n", "-C", tmp_path, "-f", ROOT / "Makefile", "setup"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={**clean, "PATH": path, **env})
        return "pip install" in done.stdout

    assert not installs()
    assert not installs(PMM_BUILD_CUDA="0")
    assert installs(PMM_BUILD_CUDA="1")
    (tmp_path / "pmm/_C.so").unlink()
    program(tmp_path / "bin/g++", "")
    assert installs(str(tmp_path / "bin"))
    assert not installs(str(tmp_path / "no compiler"))
