"""The CUDA kernels without a GPU: nvcc compiles them for every generation, and g++ runs them on the CPU, sanitized."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.ops.emulated import KERNELS, SHIM, build, under_sanitizers

GENERATIONS = (75, 80, 86, 89, 90, 100, 120)  # from Turing to Blackwell; test_cuda_build.py compiles for one
NVCC = shutil.which("nvcc")


@pytest.mark.full
@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.stem)
def test_nvcc_compiles_it_for_every_generation_without_a_warning(source, tmp_path):
    code = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in GENERATIONS]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "--threads", "2", *strict, *code, "-c", source, "-o", tmp_path / "object"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stdout + done.stderr,
        re.DOTALL,
    )
    assert {int(sm) for _, sm, _, _ in kernels} == set(GENERATIONS)
    on_hopper = [(name, int(spilled), int(registers)) for name, sm, spilled, registers in kernels if sm == "90"]
    print(f"{source.name} on SM 9.0: at most {max(on_hopper, key=lambda kernel: kernel[2])[2]} registers")
    assert not [name for name, spilled, _ in on_hopper if spilled]


@pytest.mark.parametrize(
    ("selection", "least"),
    [
        pytest.param(["-m", "not full"], 400, marks=pytest.mark.slow, id="for each change"),
        pytest.param([], 1500, marks=pytest.mark.full, id="all"),
    ],
)
def test_the_kernels_compute_what_they_must_and_the_sanitizers_see_no_fault(tmp_path, selection, least):
    library = build(tmp_path)
    checks = (SHIM / "checks.py", SHIM / "fault_checks.py")
    done = under_sanitizers(
        *("-m", "pytest", "--noconftest", "-p", "no:cacheprovider", *checks, *selection), PMM_TEST_KERNELS=str(library)
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    passed = re.search(r"\b(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) >= least
