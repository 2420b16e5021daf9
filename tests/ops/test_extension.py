"""The compiled kernels as a part of the package: found or not, required or not, whole or broken."""

import re
import shutil
import sys

import pytest
import torch

from pmm import kernels as facts
from pmm.ops import _extension, hard_mix
from tests.conftest import ROOT, run_python

MIX = "pmm.ops.hard_mix(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2), torch.tensor([0]), (1, 1), 1)"


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


def build(tmp_path, **env):
    """`setup.py build_ext` into a folder of its own."""
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    return run_python(ROOT / "setup.py", "build_ext", *folders, **{"PMM_BUILD_CUDA": "0", **env})


def compiler(tmp_path, script):
    path = tmp_path / "g++-for-tests"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_build_that_fails_names_the_part_and_leaves_no_library(tmp_path):
    old = tmp_path / "lib/pmm/_C.so"
    old.parent.mkdir(parents=True)
    old.write_text("an older build")
    words = 'case "$*" in *mixed_cam.cpp*) echo \'no such register\' >&2; exit 1;; *) exec g++ -O0 "$@";; esac'
    done = build(tmp_path, CXX=compiler(tmp_path, words))
    assert done.returncode != 0
    assert "no such register" in done.stderr
    assert "compiling cpp_ext/cpu/mixed_cam.cpp failed" in done.stderr
    assert "nothing was installed" in done.stderr
    assert not old.exists()


NO_COMPILER = {"CXX": "no-such-compiler"}
WISHES = {
    "PMM_BUILD_CUDA=yes; it must be one of auto, 0, 1": {"PMM_BUILD_CUDA": "yes"},
    "PMM_REQUIRE_EXT=1, but not built: no C++ compiler (no-such-compiler not found)": {
        "PMM_REQUIRE_EXT": "1",
        **NO_COMPILER,
    },
    "TORCH_CUDA_ARCH_LIST names Hopper; it must look like 8.6;9.0+PTX": {
        "PMM_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "Hopper",
    },
}


@pytest.mark.parametrize("words", WISHES)
def test_wishes_that_cannot_be_met_are_one_line(tmp_path, words):
    if "Hopper" in words and not shutil.which("nvcc"):
        pytest.skip("no CUDA toolkit here, so its architectures are not read")
    done = build(tmp_path, **WISHES[words])
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_compiler_the_package_builds_as_plain_python(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (no-such-compiler not found); the package works without them, slower" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_they_are_loaded_by_the_first_mix_not_by_the_import():
    script = f"import torch, pmm.ops\nbefore = 'pmm/_C.so' in open('/proc/self/maps').read()\n{MIX}\n"
    script += "print(before, 'pmm/_C.so' in open('/proc/self/maps').read())"
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = run_python("-c", script, PMM_REQUIRE_EXT="1")
    assert done.stdout.split() == ["False", "True"], done.stderr
