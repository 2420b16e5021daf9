"""TensorRT and TensorRT-RTX have one Python API: the module is a parameter ("flavor") of builder and runner."""

from __future__ import annotations

import importlib
import platform
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from pmm.utils.cuda_versions import advice
from pmm.utils.errors import BackendUnavailable, UserError, reason_of
from pmm.utils.extras import install_command
from pmm.utils.hardware import Gpu, cuda_index, driver_version, gpu_at, nvidia_gpus

T = TypeVar("T")

FLAVORS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
"""Flavor -> module."""
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of the GPUs that a portable TensorRT-RTX engine runs on (NVIDIA's "CPU-only AOT" page; one for
Turing, 7.5, has to be built for it alone, which is not done here)."""
TF32_ON = "TF32 on"
"""Among an engine's flags, if it may use TF32."""
MOST_SAID = 500
"""Characters of a library's errors that a message quotes."""
MOST_ERRORS = 100
"""Of the errors that a listener keeps until it is asked: the first."""


def load_flavor(flavor: str) -> Any:
    """The module of `flavor`. Raises UserError saying what to install if it is missing or unusable."""
    if flavor not in FLAVORS:
        raise UserError(f"unknown engine flavor '{flavor}'; known: {', '.join(FLAVORS)}")
    try:
        return importlib.import_module(FLAVORS[flavor])
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the library they load is not
        library = FLAVORS[flavor]
        raise UserError(f"{library} is missing here ({reason_of(error)}): {install_command(library)}") from error


def gpu_here(device: str = "auto") -> Gpu | None:
    """The GPU that `device` names ("auto": the first; None without one). Raises BackendUnavailable if it is not."""
    index, gpus = cuda_index(device), nvidia_gpus()
    if index is not None and not gpus:
        raise BackendUnavailable(
            f"--device {device}: no NVIDIA GPU is visible; without the flag, --flavor rtx builds anywhere"
        )
    return gpu_at(index) if index is not None else next(iter(gpus), None)


def gpu_for(flavor: str, device: str = "auto") -> Gpu | None:
    """The GPU that `device` names, if it runs engines of `flavor`. Raises BackendUnavailable as `gpu_here`."""
    gpu = gpu_here(device)
    return gpu if gpu and (flavor != "rtx" or gpu.compute_capability in RTX_CAPABILITIES) else None


def library_name(flavor: str) -> str:
    """As the package registry and users call it: tensorrt or tensorrt-rtx."""
    return FLAVORS[flavor].replace("_", "-")


def this_platform() -> str:
    """Operating system and processor, as linux-x86_64: an engine runs only where it was built."""
    return f"{platform.system()}-{platform.machine()}".lower()


def first_line(message: str) -> str:
    """Of a library's message."""
    return (message.strip().splitlines() or [""])[0]


class Listener:
    """What a library says, from now on: the errors, a line each."""

    def __init__(self, native: Any, write: Callable[[str, str], None] | None) -> None:
        self.native, self._write = native, write
        """`native`: the ILogger that the library is given."""
        self.errors: list[str] = []

    def hear(self, level: str, message: str) -> None:
        """A message, and how serious it is."""
        if self._write is not None:
            self._write(level, message)
        if level in ("ERROR", "INTERNAL_ERROR") and len(self.errors) < MOST_ERRORS:
            self.errors.append(first_line(message))

    def take(self, otherwise: object = "no reason given") -> str:
        """What was logged since the last call, as one line: the first is often the cause of the others."""
        said = "; ".join(dict.fromkeys(filter(None, self.errors)))[:MOST_SAID] or str(otherwise)
        self.errors.clear()
        return said


def error_logger(trt: Any, write: Callable[[str, str], None] | None = None) -> Listener:
    """A listener to the module `trt`.

    Of the loggers that builders and runtimes are given, the library uses the first for all of them, until all are
    gone (github.com/NVIDIA/TensorRT/issues/1475). So there is one, for as long as the process lives, and listeners.

    Args:
        write: gets the level and the text of every message, from the most serious to the most verbose.
    """
    with _LOCK:
        native = _NATIVE.get(trt) or _NATIVE.setdefault(trt, _native(trt.ILogger))
        listener = Listener(native, write)
        heard = [reference for reference in native.listeners if reference() is not None]
        native.listeners = [*heard, weakref.ref(listener)]
    return listener


_NATIVE: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _native(base: Any) -> Any:
    class Logger(base):
        """Tells the listeners."""

        def __init__(self) -> None:
            # pybind11 wants the base's own constructor called, not super()'s
            base.__init__(self)
            self.listeners: list[weakref.ref[Listener]] = []

        def log(self, severity: Any, message: str) -> None:
            for reference in self.listeners:
                if (listener := reference()) is not None:
                    listener.hear(severity.name, message)

    return Logger()


def started(make: Callable[[Any], T], logger: Listener, name: str) -> T:
    """A Builder or Runtime, `make(logger.native)`; `name` ends in the library's name and version.

    Raises UserError where the library cannot start: there, its binding raises TypeError.
    """
    try:
        return make(logger.native)
    except TypeError as error:
        driver = driver_version()
        serves = f"the driver serves CUDA {driver}" if driver else "no NVIDIA driver is here"
        library = name.rpartition(": ")[2].partition(" ")[0]
        mend = advice(library_name(library) if library in FLAVORS else library)
        mend = mend or ": update the driver, or install the release for its CUDA version"
        raise UserError(f"{name} cannot start here ({logger.take(error)}); {serves}{mend}") from error
