"""The CUDA part of the library compiles, links and registers its kernels; what they compute, only a GPU can tell."""

import json
import time

import pytest
import torch

from pmm.utils import build_info
from pmm.utils.cuda_toolkit import find_toolkit
from tests.conftest import ROOT, run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_toolkit() is None, reason="no CUDA toolkit here"),
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch has no CUDA"),
]
OPS = ("rank_blocks", "select", "adjoint", "max_pool", "unpool", "mixed_cam")
# a warning is an error, and so is a register that is spilled to memory; test_device_code.py: on other GPUs, too
STRICT = "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas --warn-on-spills,--warning-as-error"
QUICK = "-O0 -DPMM_CLONES="  # the C++ sources, which are built as users have them before any test runs
REGISTERED = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({op: [key for key in ("CPU", "CUDA") if has(f"pmm_kernels::{op}", key)] for op in sys.argv[2:]}))
"""


def test_the_library_with_cuda_loads_and_has_every_kernel(tmp_path, monkeypatch):
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    env = {"PMM_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "NVCC_APPEND_FLAGS": STRICT, "CXXFLAGS": QUICK}
    began = time.monotonic()
    done = run_python(ROOT / "setup.py", "build_ext", *folders, **env)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 240
    library = tmp_path / "lib/pmm/_C.so"

    monkeypatch.setattr(build_info, "LIBRARY", library)
    found = build_info.build_info()
    assert found["cuda"]
    assert found["architectures"] == ["9.0"]
    assert found["sources"] == build_info.sources_digest(ROOT / "cpp_ext")
    assert f"CUDA {found['cuda']} in " in done.stdout

    done = run_python("-c", REGISTERED, library, *OPS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {op: ["CPU", "CUDA"] for op in OPS}
