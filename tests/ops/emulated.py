"""The CUDA kernels of cpp_ext/cuda, executed on the CPU: compiled by g++ over the shim in device_on_host, sanitized."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "ops" / "device_on_host"
KERNELS = ROOT / "cpp_ext" / "cuda"
# what is off ends the process anyway, or is seen by the other one; it would take a sixth of the time to compile
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all")
# nvcc reads memory through pointers of any type, and knows #pragma unroll
PERMISSIVE = ("-fno-strict-aliasing", "-Wno-unknown-pragmas")
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", *PERMISSIVE, *SANITIZERS)
GARBAGE = 0xA5


def build(folder: Path) -> Path:
    """The library in `folder`, built unless it is there for these very sources.

    Raises RuntimeError with the compiler's words.
    """
    sources = [*sorted(KERNELS.glob("*.cu")), *sorted(SHIM.glob("*.cu")), *sorted(SHIM.glob("*.cpp"))]
    headers = [*sorted(ROOT.glob("cpp_ext/*.h")), *sorted(KERNELS.glob("*.h")), *sorted(SHIM.glob("*.h"))]
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    library = folder / f"device_on_host-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder), sources))
    unfinished = library.with_suffix(f".{os.getpid()}")
    _run("g++", "-shared", *SANITIZERS, *objects, "-o", unfinished)
    return unfinished.replace(library)


def under_sanitizers(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`python ARGS` from the repository root in a process that can load the library."""
    # ASan looks for __cxa_throw as it starts: without libstdc++ beside it, the first C++ exception ends the process
    preload = " ".join(_run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so"))
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **options, **env})


class Emulated:
    """The six kernels with the arguments of the torch ops, outputs last; sizes, dtypes and layout from the tensors."""

    def __init__(self, library: str | Path, schedule: int = 0) -> None:
        self._library = ctypes.CDLL(str(library))
        self.schedule(schedule)

    def schedule(self, seed: int) -> None:
        """The order in which threads and blocks run: 0 forward, 1 backward, any other a shuffle."""
        self._library.pmm_set_schedule(ctypes.c_uint(seed))

    def rank_blocks(self, cam: Tensor, bh: int, bw: int, k: int, skip_empty: bool, replaced: Tensor) -> None:
        ranking = _Ranking(*cam.shape, bh, bw, k, _DTYPES.index(cam.dtype), skip_empty)
        self._call("rank_blocks", ranking, cam, replaced, scratch=True)

    def select(self, x: Tensor, replaced: Tensor, partner: Tensor, y: Tensor) -> None:
        self._call("select", _maps(x), x, replaced, partner, y)

    def adjoint(self, dy: Tensor, replaced: Tensor, partner: Tensor, dx: Tensor) -> None:
        self._call("adjoint", _maps(dy), dy, replaced, partner, dx, scratch=True)

    def max_pool(self, x: Tensor, replaced: Tensor, partner: Tensor, pooled: Tensor, cell: Tensor) -> None:
        self._call("max_pool", _maps(x), x, replaced, partner, pooled, cell)

    def unpool(self, dy: Tensor, cell: Tensor, replaced: Tensor, partner: Tensor, dx: Tensor) -> None:
        self._call("unpool", _maps(dx), dy, cell, replaced, partner, dx, scratch=True)

    def mixed_cam(self, x: Tensor, replaced: Tensor, partner: Tensor, weights: Tensor, cam: Tensor) -> None:
        self._call("mixed_cam", _maps(x), x, replaced, partner, weights, cam, scratch=True)

    def fault(self, name: str, given: Tensor, out: Tensor) -> None:
        """Run a kernel of device_on_host/faults.cu on int32 [64]."""
        self._library.pmm_fault(name.encode(), *map(_address, (given, out)))

    def _call(self, name: str, sizes: ctypes.Structure, *tensors: Tensor, scratch: bool = False) -> None:
        pointer = ctypes.byref(sizes)
        arguments = list(tensors)
        if scratch:
            measure = getattr(self._library, f"pmm_{name}_scratch")
            measure.restype = ctypes.c_size_t
            arguments.append(torch.empty(measure(pointer), dtype=torch.uint8).fill_(GARBAGE))
        getattr(self._library, f"pmm_{name}")(pointer, *map(_address, arguments))


class _Maps(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "c", "h", "w")),
        ("dtype", ctypes.c_int32),
        ("channels_last", ctypes.c_bool),
    )


class _Ranking(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "bh", "bw", "k")),
        ("dtype", ctypes.c_int32),
        ("skip_empty", ctypes.c_bool),
    )


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # as in enum DType


def _maps(maps: Tensor) -> _Maps:
    channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return _Maps(*maps.shape, _DTYPES.index(maps.dtype), channels_last)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _compile(source: Path, folder: Path) -> Path:
    target = folder / f"{source.name}.o"
    _run("g++", "-x", "c++", *FLAGS, "-I", SHIM, "-c", source, "-o", target)
    return target


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout
