"""Native code is opened only where it can run. Of real engines and packages: tests/runtime."""

import dataclasses
from pathlib import Path

import pytest

from pmm.artifacts.manifest import PackageContract
from pmm.artifacts.native_file import check_origin
from pmm.utils.errors import UserError
from tests.artifacts.test_manifest import ENGINE

PACKAGE = PackageContract(
    device="cpu",
    torch="2.9",
    platform="linux-x86_64",
    instructions=("avx2", "fma"),
    gpu="",
    compute_capability="",
    precision_read_from="exported graph",
)
ON_GPU = dataclasses.replace(PACKAGE, device="cuda", gpu="a GPU", compute_capability="9.0")
FILE = Path("model.bin")


def test_a_better_cpu_and_another_gpu_of_the_same_kind_will_do():
    check_origin(FILE, PACKAGE, dataclasses.replace(PACKAGE, instructions=("amx", "avx2", "fma")), ("",))
    check_origin(FILE, ON_GPU, dataclasses.replace(ON_GPU, gpu="another of its kind"), ("9.0",))
    portable = dataclasses.replace(ENGINE, hardware_compatibility="ampere-plus")
    check_origin(FILE, portable, dataclasses.replace(portable, gpu="another", compute_capability="12.0"), ())


def test_all_that_differs_is_named_with_the_way_out():
    here = dataclasses.replace(ON_GPU, torch="9.9", platform="linux-riscv64", instructions=("fma",), gpu="my GPU")
    with pytest.raises(UserError) as error:
        check_origin(FILE, dataclasses.replace(ON_GPU, compute_capability="8.9"), here, ("8.9",))
    for fact in (
        "model.bin: this package cannot run here", "torch is 9.9 here, it was built with 2.9",
        "this is linux-riscv64, it was built for linux-x86_64", "this CPU has no avx2",
        "the GPU is my GPU (compute capability 9.0), it was built on a GPU for compute capability 8.9",
        "pmm export aoti",
    ):  # fmt: skip
        assert fact in str(error.value)
    with pytest.raises(
        UserError, match=r"engine cannot run here: tensorrt is 12\.0 here, .* 11\.4\.0; .*pmm export trt"
    ):
        check_origin(FILE, ENGINE, dataclasses.replace(ENGINE, version="12.0"), ("8.9",))
