"""The tests of the ops once more, on code that the sanitizers watch: memory, alignment and integer arithmetic."""

import re
import shutil

import pytest

from tests.conftest import ROOT, run_python
from tests.ops.emulated import SANITIZERS, build, under_sanitizers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")]
TESTS = [f"tests/ops/test_{op}.py" for op in ("hard_mix", "hard_mix_max_pool", "mixed_cam")]


def passes(**env):
    """Whether these tests pass where `env` says which kernels they run on."""
    done = under_sanitizers("-m", "pytest", "-p", "no:cacheprovider", *TESTS, **env)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    counts = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    return counts is not None and int(counts[1]) > 100


def test_the_cuda_kernels_executed_on_the_cpu(tmp_path):
    assert passes(PMM_TEST_KERNELS=str(build(tmp_path)))


def test_the_cpu_kernels(tmp_path):
    compiler = " ".join(["g++", *SANITIZERS, "-g", "-fno-omit-frame-pointer"])
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    done = run_python(ROOT / "setup.py", "build_ext", *folders, CXX=compiler, PMM_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert passes(PMM_TEST_LIBRARY=str(tmp_path / "lib/pmm/_C.so"), PMM_REQUIRE_EXT="1")
