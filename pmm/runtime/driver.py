"""The CUDA driver through ctypes, for functions that not every CUDA library of Python has; a thread's current GPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

from pmm.utils.errors import UserError
from pmm.utils.hardware import cuda_library


class DriverError(UserError):
    """The CUDA driver refused a call."""


def libcuda() -> Any:
    """The driver's library. Raises DriverError without one."""
    library = cuda_library()
    if library is None:
        raise DriverError("this machine has no NVIDIA driver", hint="install it, or run on the CPU")
    return library


def call(library: Any, name: str, *args: Any) -> None:
    """Call a function of the driver; most want the GPU's context to be this thread's. Raises DriverError."""
    try:
        code = getattr(library, name)(*args)
    except AttributeError as error:
        raise DriverError(f"this NVIDIA driver is too old: it has no {name}", hint="update the driver") from error
    if code != 0:
        text = ctypes.c_char_p()
        known = library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value is not None
        raise DriverError(f"{name} failed ({text.value.decode() if known and text.value else f'CUDA error {code}'})")


@contextlib.contextmanager
def current_gpu(index: int) -> Iterator[None]:
    """Make the GPU of that index this thread's current one.

    Its primary context, which CUDA's runtime and torch use too, is kept until the process ends: objects made in it may
    live longer than this. Raises DriverError.
    """
    cuda = libcuda()
    call(cuda, "cuCtxPushCurrent_v2", _primary_context(cuda, index))
    try:
        yield
    finally:
        call(cuda, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache
def _primary_context(cuda: Any, index: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call(cuda, "cuInit", 0)
    call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context
