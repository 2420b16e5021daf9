"""What this machine has: NVIDIA GPUs, asked of the driver (TensorRT may crash without one), and CPU cores."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache


@cache
def nvidia_gpus() -> tuple[str, ...]:
    """Names of the GPUs that the CUDA driver sees; empty without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    names = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        if cuda.cuDeviceGet(ctypes.byref(device), index) == 0 and cuda.cuDeviceGetName(name, 128, device) == 0:
            names.append(name.value.decode())
    return tuple(names)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
