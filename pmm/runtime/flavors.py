"""TensorRT and TensorRT-RTX have one Python API: the module is a parameter ("flavor") of builder and runner."""

from __future__ import annotations

import importlib
import platform
from typing import Any

from pmm.errors import UserError
from pmm.machine import Gpu, nvidia_gpus

FLAVORS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
"""Flavor -> module."""
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of the GPUs that a portable TensorRT-RTX engine runs on (NVIDIA's "CPU-only AOT" page; one for
Turing, 7.5, has to be built for it alone, which is not done here)."""


def load_flavor(flavor: str) -> Any:
    """The module of `flavor`. Raises UserError saying what to install if it is missing or unusable."""
    if flavor not in FLAVORS:
        raise UserError(f"unknown engine flavor '{flavor}'; known: {', '.join(FLAVORS)}")
    try:
        return importlib.import_module(FLAVORS[flavor])
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the library they load is not
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{FLAVORS[flavor]} is missing here ({reason}): pip install {library_name(flavor)}") from error


def gpu_for(flavor: str) -> Gpu | None:
    """The GPU here that runs engines of `flavor`; None without one."""
    gpus = nvidia_gpus()
    return gpus[0] if gpus and (flavor != "rtx" or gpus[0].compute_capability in RTX_CAPABILITIES) else None


def library_name(flavor: str) -> str:
    """As the package registry and users call it: tensorrt or tensorrt-rtx."""
    return FLAVORS[flavor].replace("_", "-")


def this_platform() -> str:
    """Operating system and processor, as linux-x86_64: an engine runs only where it was built."""
    return f"{platform.system()}-{platform.machine()}".lower()


def last_error_logger(trt: Any) -> Any:
    """An ILogger of module `trt` that keeps the last error's first line in `.last`, and is silent otherwise."""

    class Logger(trt.ILogger):
        """What the library says on the way (progress, warnings) is not for the user."""

        last = ""

        def __init__(self) -> None:
            # pybind11 wants the base's own constructor called, not super()'s
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = (message.strip().splitlines() or [""])[0]

    return Logger()
