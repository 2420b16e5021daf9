"""Which GPU a library takes that is told none: CUDA's current one, in each thread."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

from pmm.runtime import driver


@contextlib.contextmanager
def current_gpu(index: int) -> Iterator[None]:
    """Make the GPU of that index this thread's current one.

    Its primary context, which CUDA's runtime and torch use too, is kept until the process ends: objects made in it may
    live longer than this. Raises DriverError.
    """
    cuda = driver.libcuda()
    driver.call(cuda, "cuCtxPushCurrent_v2", _primary_context(cuda, index))
    try:
        yield
    finally:
        driver.call(cuda, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache
def _primary_context(cuda: Any, index: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    driver.call(cuda, "cuInit", 0)
    driver.call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    driver.call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context
