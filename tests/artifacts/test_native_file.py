"""Native code is opened only where it can run. Of real engines and packages: tests/runtime."""

import dataclasses
from pathlib import Path

from pmm.artifacts.native_contracts import PackageContract
from pmm.artifacts.native_file import check_origin
from pmm.utils.errors import InvalidFile
from tests.artifacts.test_manifest import ENGINE
from tests.refusals import refuses

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
    versions, gpus = ("torch is 9.9", "2.9"), ("my GPU", "capability 9.0", "a GPU", "capability 8.9")
    facts = ("package", *versions, "linux-riscv64", "linux-x86_64", "no avx2", *gpus)
    with refuses(InvalidFile, *facts, path=FILE, hint="pmm export aoti"):
        check_origin(FILE, dataclasses.replace(ON_GPU, compute_capability="8.9"), here, ("8.9",))
    with refuses(InvalidFile, "engine", "tensorrt is 12.0", "11.4.0", path=FILE, hint="pmm export trt"):
        check_origin(FILE, ENGINE, dataclasses.replace(ENGINE, version="12.0"), ("8.9",))
