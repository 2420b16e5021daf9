"""The NVIDIA GPUs (by the driver: TensorRT may crash without one) and CPU cores of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pmm.utils.cgroup import cpu_quota
from pmm.utils.errors import BackendUnavailable, InvalidValue

T = TypeVar("T")


RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of the GPUs that a portable TensorRT-RTX engine runs on (NVIDIA's "CPU-only AOT" page; one for
Turing, 7.5, has to be built for it alone, which is not done here)."""
MAX_THREADS = 1024
"""With far more threads, libraries end the process without a message, or take all of the memory."""


class Gpu(NamedTuple):
    """An NVIDIA GPU."""

    name: str
    compute_capability: str
    """Major and minor, as 8.9."""

    @property
    def has_tf32(self) -> bool:
        """Products of fp32 numbers with 10 bits of mantissa, added up in fp32: since Ampere. On older GPUs, libraries
        that are allowed TF32 compute in fp32 without a message."""
        return float(self.compute_capability) >= 8.0

    @property
    def has_bf16(self) -> bool:
        """Products in bf16 by the hardware, several times faster than in fp32: since Ampere, too."""
        return self.has_tf32

    @property
    def has_fast_fp16(self) -> bool:
        """Products in fp16 several times faster than in fp32: since Volta."""
        return float(self.compute_capability) >= 7.0


@cache
def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that the CUDA driver sees; empty without a driver or a GPU."""
    cuda = cuda_library()
    count = ctypes.c_int()
    if cuda is None or cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    gpus = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        if cuda.cuDeviceGet(ctypes.byref(device), index) == 0 and cuda.cuDeviceGetName(name, 128, device) == 0:
            capability = ".".join(str(_attribute(cuda, which, device)) for which in _CAPABILITY)
            gpus.append(Gpu(name.value.decode(), capability))
    return tuple(gpus)


def hide_gpus() -> None:
    """Show no GPU to this process and its children, before a library has looked for one.

    Otherwise torch's Adam initialises CUDA in its first step, to ask for the GPU's stream, for weights on the CPU too.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def cuda_index(device: str) -> int | None:
    """The index of the GPU that "cuda" (the first) or "cuda:N" names, among those that CUDA_VISIBLE_DEVICES leaves
    visible; None for "auto" and "cpu". Raises InvalidValue for any other word."""
    if device in ("auto", "cpu"):
        return None
    match = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", device)
    if not match:
        raise InvalidValue("device", device, "auto, cpu, cuda or cuda:N (N is 0 for the first GPU)")
    return int(match[1] or 0)


def gpu_at(index: int) -> Gpu:
    """The GPU of that index. Raises BackendUnavailable, with the GPUs that are visible, if there is none."""
    gpus = nvidia_gpus()
    if index < len(gpus):
        return gpus[index]
    if not gpus:
        hint = "use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES"
        raise BackendUnavailable("no NVIDIA GPU is visible", hint=hint)
    names = ", ".join(f"{number} {gpu.name}" for number, gpu in enumerate(gpus))
    problem = f"there is no GPU {index}: {len(gpus)} visible ({names})"
    raise BackendUnavailable(problem, hint="CUDA_VISIBLE_DEVICES says which are visible")


def check_threads(count: int) -> None:
    """Raises InvalidValue for a number of CPU threads below 0 (the default number) or beyond any use."""
    if not 0 <= count <= MAX_THREADS:
        raise InvalidValue("threads", count, f"0 (the default) to {MAX_THREADS}")


@cache
def driver_version() -> str:
    """The highest CUDA version that the driver serves, as 13.0; empty without a driver."""
    cuda, version = cuda_library(), ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def _attribute(cuda: Any, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    return value.value if cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device) == 0 else 0


@cache
def cuda_library() -> Any:
    """The CUDA driver's library, through ctypes; None without a driver."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def nvidia_driver() -> str:
    """The NVIDIA driver's own version, as 580.65.06; empty without one."""
    return _query_nvml(lambda nvml: str(nvml.nvmlSystemGetDriverVersion())) or ""


def gpu_memory_of(process: int) -> int | None:
    """Bytes of GPU memory of a process on all GPUs; None if the driver does not report it."""

    def total(nvml: Any) -> int | None:
        sizes = []
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # this GPU does not report it
                entries = nvml.nvmlDeviceGetComputeRunningProcesses_v3(nvml.nvmlDeviceGetHandleByIndex(index))
                sizes += [entry.usedGpuMemory for entry in entries if entry.pid == process]
        reported = [size for size in sizes if size is not None]
        return sum(reported) if reported else None

    return _query_nvml(total)


def _query_nvml(query: Callable[[Any], T]) -> T | None:
    """The result of `query` with nvidia-ml-py's module; None without that package or a driver, or if NVML fails."""
    try:
        import pynvml
    except ImportError:  # as where the kernels are built
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return query(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, as Linux names it (avx512_bf16, for example); empty on other systems."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].partition("\n")[0].split())
    except OSError:
        return frozenset()


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies numbers in bf16: an x86 one with AVX512-BF16 or AMX. On others torch emulates it."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def int8_overflows() -> bool:
    """True for an x86 CPU without VNNI or AMX, which sums pairs of 8-bit products in 16 bits: with weights beyond 7
    bits the largest sums are cut off. Only Linux reports it; False elsewhere."""
    flags = cpu_flags()
    return "sse2" in flags and not any("vnni" in flag or flag == "amx_int8" for flag in flags)


def installed_version(distribution: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def clashing_wheels() -> str:
    """The conflict of two installed packages of ONNX Runtime, and what to do; empty if there is none."""
    if all(installed_version(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "pip uninstall both, then install one"
        )
    return ""


def usable_cores() -> int:
    """CPU cores that this process may use: those that it may run on or, if that is less, its groups' quota of time."""
    quota = quota_cores()
    return len(_allowed_cores()) if quota is None else min(len(_allowed_cores()), quota)


@cache
def quota_cores() -> int | None:
    """The quota of CPU time of this process's control groups, in whole cores; None without one.

    A part of a core counts as one, as it does for Java and Go: two threads in 1.5 cores' time do half as much again as
    one, though both pause in each period; and half a core has to be enough for one.
    """
    quota = cpu_quota()
    return None if quota is None else math.ceil(quota)


def compute_threads() -> int:
    """Threads for a library that computes: one for each physical core that this process may run on, or fewer if its
    quota is less. By themselves such libraries ask for no quota, and more threads than that stand still for most of
    each period, those too that others wait for."""
    return min(physical_cores(), quota_cores() or sys.maxsize)


def _allowed_cores() -> set[int]:
    """Numbers of the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores that this process may run on, as far as the system reports which cores share one."""
    return len({_siblings(core) for core in _allowed_cores()})


def _siblings(core: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(core)
