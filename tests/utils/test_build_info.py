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


def test_the_search_has_a_library_and_sources_of_its_own(built_with, tmp_path, monkeypatch):
    sources = tmp_path / "cpp_ext"
    (sources / "search").mkdir(parents=True)
    (sources / "kernels.h").touch()
    (sources / "search" / "search.h").touch()
    built_with(**{**CPU, "sources": build_info.sources_digest(sources)})
    monkeypatch.setattr(build_info, "SOURCES", sources)
    library = tmp_path / "_search.so"
    monkeypatch.setattr(build_info, "SEARCH_LIBRARY", library)
    assert build_info.search_build_info() == {"compiled": False}
    assert build_info.describe_search_build() == "numpy (the kernel is not compiled)"
    facts = {"compiler": "g++ 12.2.0", "sources": build_info.sources_digest(sources / "search")}
    library.write_bytes(b"\x7fELF\0pmm kernels built " + json.dumps(facts).encode() + b"\0more")
    assert build_info.search_build_info() == {"compiled": True, **facts}
    assert build_info.describe_search_build() == f"compiled (g++ 12.2.0; sources {facts['sources']})"
    (sources / "search" / "search.h").write_text("int rows;")
    assert build_info.search_build_info() == {"compiled": False, "stale": True}
    assert build_info.describe_search_build() == "numpy (the kernel is of other sources)"
    assert build_info.build_info()["compiled"]


def test_the_environment_says_it_without_torch():
    done = run_without_torch("-m", "pmm", "info", "--json")
    environment = json.loads(done.stdout)["environment"]
    assert environment["kernels"] == build_info.build_info(), done.stderr
    assert environment["search_kernel"] == build_info.search_build_info()


@pytest.mark.parametrize(
    ("architecture", "runs", "fails"),
    [
        ("7.5", "7.5", "7.0 8.0"),
        ("8.0", "8.0 8.6 8.9", "7.5 8.7 9.0"),
        ("8.6", "8.6 8.9", "8.0 8.7"),
        ("8.7", "8.7", "8.6 8.9"),
        ("9.0", "9.0", "8.9 10.0"),
        ("10.0", "10.0 10.3", "9.0 11.0 12.0"),
        ("12.0", "12.0 12.1", "10.0"),
        ("9.0a", "9.0", "9.1 10.0"),
        ("10.3a", "10.3", "10.0 10.4"),
        ("10.0f", "10.0 10.3", "11.0 12.0"),
        ("8.0+PTX", "8.0 8.6 8.7 9.0 12.1", "7.5"),
        ("9.0a+PTX", "9.0", "10.0 12.0"),
        ("12.0f+PTX", "12.0 12.1", "13.0"),
    ],
)
def test_where_machine_code_and_ptx_run(architecture, runs, fails):
    assert [gpu for gpu in runs.split() if not build_info.runs_on(architecture, gpu)] == []
    assert [gpu for gpu in fails.split() if build_info.runs_on(architecture, gpu)] == []


@pytest.mark.parametrize(
    ("gpu", "driver", "fact"),
    [
        ("9.0", "13.0", None),
        ("12.0", "13.4", None),
        ("12.1", "13.0", None),
        ("13.0", "13.0", None),  # by PTX
        ("8.6", "13.0", "not for 8.6"),
        ("9.0", "12.8", "12.8 at most"),
    ],
)
def test_kernels_for_a_gpu_and_its_driver(built_with, gpu, driver, fact):
    built_with(**CUDA)
    reason = build_info.not_built_for(gpu, driver)
    assert reason is None if fact is None else fact in reason
    assert fact is None or "pip install --no-build-isolation" in reason


def test_an_older_driver_does_not_compile_the_ptx_of_a_newer_toolkit(built_with):
    built_with(**{**CUDA, "cuda": "13.2"})
    assert build_info.not_built_for("12.0", "13.0") is None
    assert "not for 13.0" in build_info.not_built_for("13.0", "13.0")
    assert build_info.not_built_for("13.0", "13.2") is None
