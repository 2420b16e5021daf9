"""What compiled kernels say of themselves, read from the library's bytes: no torch, nothing loaded."""

import json

import pytest

from pmm.utils import build_info
from tests.conftest import run_without_torch

CPU = {"compiler": "g++ 12.2.0", "cuda": None, "architectures": [], "sources": "0123456789ab"}
CUDA = {**CPU, "cuda": "13.0", "architectures": ["9.0", "12.0+PTX"]}


def test_nothing_compiled(built_with, monkeypatch, tmp_path):
    built_with()
    assert build_info.build_info() == {"compiled": False}
    assert build_info.describe_build() == "plain torch (the kernels are not compiled)"
    assert build_info.build_version() == "none"
    assert "not compiled; run pip install" in build_info.not_built("cpu")
    assert "not compiled; run pip install" in build_info.not_built("cuda")
    monkeypatch.setattr(build_info, "SOURCES", tmp_path)  # as in a clone
    assert "not compiled; run make setup" in build_info.not_built("cpu")


def test_built_without_cuda(built_with):
    built_with(**CPU)
    assert build_info.build_info() == {"compiled": True, **CPU}
    assert build_info.describe_build() == "compiled (g++ 12.2.0; no CUDA; sources 0123456789ab)"
    assert build_info.build_version() == "0123456789ab, g++ 12.2.0, no CUDA"
    assert build_info.not_built("cpu") is None
    assert build_info.not_built("cuda") == "the kernels were built without CUDA; rebuild with PMM_BUILD_CUDA=1"


def test_built_with_cuda(built_with):
    built_with(**CUDA)
    assert build_info.describe_build() == "compiled (g++ 12.2.0; CUDA 13.0 for 9.0 12.0+PTX; sources 0123456789ab)"
    assert build_info.build_version() == "0123456789ab, g++ 12.2.0, CUDA 13.0"
    assert build_info.not_built("cpu") is None
    assert build_info.not_built("cuda") is None
    assert build_info.not_built("mps") == "there are no kernels for mps"


def test_a_build_of_other_sources_does_not_count(built_with, tmp_path, monkeypatch):
    sources = tmp_path / "cpp_ext"
    (sources / "cpu").mkdir(parents=True)
    (sources / "kernels.h").touch()
    (sources / "cpu" / "mix.cpp").write_text("int one = 1;")
    built_with(**{**CUDA, "sources": build_info.sources_digest(sources)})
    monkeypatch.setattr(build_info, "SOURCES", sources)
    assert build_info.not_built("cpu") is None
    (sources / "cpu" / "mix.cpp").write_text("int one = 2;")
    for device in ("cpu", "cuda"):
        assert "built from other sources than cpp_ext/ has now; run make setup" in build_info.not_built(device)
    assert build_info.build_info() == {"compiled": False, "stale": True}
    assert build_info.describe_build() == "plain torch (the kernels are of other sources)"
    (sources / "cpu" / "mix.cpp").write_text("int one = 1;")
    (sources / "notes.txt").write_text("no source")
    assert build_info.not_built("cpu") is None


def test_the_facts_of_another_build_are_described_as_given(built_with):
    built_with()
    assert "CUDA 13.0" in build_info.describe_build({"compiled": True, **CUDA})


@pytest.mark.parametrize("content", [b"", b"\x7fELF no facts", b"pmm kernels built {"])
def test_a_library_without_facts_is_no_build_of_ours(tmp_path, monkeypatch, content):
    (tmp_path / "_C.so").write_bytes(content)
    monkeypatch.setattr(build_info, "LIBRARY", tmp_path / "_C.so")
    assert build_info.build_info() == {"compiled": False}


def test_the_environment_says_it_without_torch():
    done = run_without_torch("-m", "pmm", "info", "--json")
    assert json.loads(done.stdout)["environment"]["kernels"] == build_info.build_info(), done.stderr
