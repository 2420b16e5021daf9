"""Calls of the CUDA driver through ctypes, for what not every CUDA library of Python has."""

from __future__ import annotations

import ctypes
from typing import Any

from pmm.utils.errors import UserError
from pmm.utils.hardware import cuda_library


class DriverError(UserError):
    """The CUDA driver refused a call."""


def libcuda() -> Any:
    """The driver's library. Raises DriverError without one."""
    library = cuda_library()
    if library is None:
        raise DriverError("no NVIDIA driver here")
    return library


def call(library: Any, name: str, *args: Any) -> None:
    """Call a function of the driver; most want the GPU's context to be this thread's. Raises DriverError."""
    try:
        code = getattr(library, name)(*args)
    except AttributeError as error:
        raise DriverError(f"{name}: this NVIDIA driver is too old, and has no such function; update it") from error
    if code != 0:
        text = ctypes.c_char_p()
        known = library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value is not None
        raise DriverError(f"{name} failed ({text.value.decode() if known and text.value else f'CUDA error {code}'})")
