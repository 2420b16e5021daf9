"""The tests of the compiled scan and ranks once more, watched by sanitizers: memory, alignment, integers."""

import re
import shutil

import pytest

from tests.ops.emulated import SANITIZERS, under_sanitizers
from tests.search_library import WATCHED
from tests.test_setup import load


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
@pytest.mark.parametrize("level", ["-O1", pytest.param("-O3", marks=pytest.mark.full)])
def test_the_compiled_scan_and_ranks(tmp_path, monkeypatch, level):
    for variable in ("CXX", "LDFLAGS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CXX", " ".join(["g++", *SANITIZERS]))
    monkeypatch.setenv("CXXFLAGS", f"{level} -g1 -fno-omit-frame-pointer")
    load().build_search(tmp_path / "_search.so", tmp_path / "objects")
    tests = "tests/exact_search/test_kernel.py", "tests/evaluation/test_compiled.py"
    done = under_sanitizers("-m", "pytest", "-p", "no:cacheprovider", *tests, **{WATCHED: str(tmp_path / "_search.so")})
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    counts = re.search(r"\b(\d+) passed", done.stdout)
    assert counts is not None
    assert int(counts[1]) >= 28
