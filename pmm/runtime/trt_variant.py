"""TensorRT and TensorRT-RTX, two libraries ("flavors") with one Python API: loading and starting one, the GPUs that its
engines run on, its messages, its profiler.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from pmm.artifacts.batch_profiles import BatchProfiles
from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.artifacts.native_contracts import EngineContract
from pmm.artifacts.native_file import check_origin
from pmm.runtime.fork import check_cuda_after_fork
from pmm.utils.cuda_versions import advice
from pmm.utils.errors import BackendUnavailable, InvalidValue, OutOfMemory, UserError
from pmm.utils.extras import import_library
from pmm.utils.hardware import RTX_CAPABILITIES, Gpu, cuda_index, driver_version, gpu_at, nvidia_gpus

T = TypeVar("T")

FLAVORS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
"""Flavor -> module."""
TF32_ON = "TF32 on"
"""Among an engine's flags, if it may use TF32."""
MESSAGE_LENGTH = 500
"""Characters of a library's errors that a message quotes."""
MAX_ERRORS = 100
"""Of the errors that a listener keeps: the first."""
WARM_UP = 3
"""Runs before those that `layer_times` counts."""


def load_flavor(flavor: str) -> Any:
    """The module of `flavor`. Raises MissingLibrary saying what to install, InvalidValue for another word."""
    if flavor not in FLAVORS:
        raise InvalidValue("flavor", flavor, choices=FLAVORS)
    return import_library(FLAVORS[flavor])


def gpu_here(device: str = "auto") -> Gpu | None:
    """The GPU that `device` names ("auto": the first; None without one). Raises BackendUnavailable if it is missing."""
    index, gpus = cuda_index(device), nvidia_gpus()
    if index is not None and not gpus:
        hint = "without the flag, --flavor rtx builds anywhere"
        raise BackendUnavailable(f"--device {device}: no NVIDIA GPU is visible", hint=hint)
    return gpu_at(index) if index is not None else next(iter(gpus), None)


def gpu_for(flavor: str, device: str = "auto") -> Gpu | None:
    """The GPU that `device` names, if it runs engines of `flavor`. Raises BackendUnavailable as `gpu_here`."""
    gpu = gpu_here(device)
    return gpu if gpu and (flavor != "rtx" or gpu.compute_capability in RTX_CAPABILITIES) else None


def chosen_gpu(path: Path, device: str) -> tuple[int, Gpu]:
    """The GPU that is to run the engine, and its index; "auto" is the first one. Raises BackendUnavailable."""
    hint = "run its ONNX file on the CPU"
    if device == "cpu":
        raise BackendUnavailable("engines run on NVIDIA GPUs only", path=path, hint=hint)
    index = cuda_index(device) or 0
    check_cuda_after_fork()
    if not nvidia_gpus():
        problem = "engines run on NVIDIA GPUs only, and the CUDA driver sees none"
        raise BackendUnavailable(problem, path=path, hint=hint)
    return index, gpu_at(index)


def check_engine(path: Path, contract: EngineContract, version: str, gpu: Gpu) -> None:
    """Raises InvalidFile naming every difference between this machine, whose library is of `version`, and those that
    can run the engine."""
    here = dataclasses.replace(
        contract, version=version, platform=this_platform(), gpu=gpu.name, compute_capability=gpu.compute_capability
    )
    # TensorRT itself checks on loading whether this GPU runs a portable engine of its own
    capabilities = () if contract.portable else (contract.compute_capability,)
    check_origin(path, contract, here, RTX_CAPABILITIES if contract.flavor == "rtx" else capabilities)
    if contract.hardware_compatibility == "none" and not contract.portable and gpu.name != contract.gpu:
        # the same machine code; kernels were chosen by times on the other GPU (TensorRT logs the same warning)
        logging.getLogger("pmm").warning("%s: built on %s; on this %s it may be slower", path, contract.gpu, gpu.name)


def engine_precision(manifest: Manifest, contract: EngineContract, gpu: Gpu) -> str:
    """In which the engine runs: an fp32 engine that may use TF32 runs in tf32, if the GPU has it."""
    precision = manifest.precision_found
    return "tf32" if precision == "fp32" and TF32_ON in contract.flags and gpu.has_tf32 else precision


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
    """A library's messages from now on: the errors, a line each."""

    def __init__(self, native: Any, write: Callable[[str, str], None] | None) -> None:
        self.native, self._write = native, write
        """`native`: the ILogger to pass to the library."""
        self.errors: list[str] = []

    def add(self, level: str, message: str) -> None:
        """Take a message and its level of severity."""
        if self._write is not None:
            self._write(level, message)
        if level in ("ERROR", "INTERNAL_ERROR") and len(self.errors) < MAX_ERRORS:
            self.errors.append(first_line(message))

    def take(self, otherwise: object = "no reason given") -> str:
        """The errors since the last call as one line: the first is often the cause of the others."""
        line = "; ".join(dict.fromkeys(filter(None, self.errors)))[:MESSAGE_LENGTH] or str(otherwise)
        self.errors.clear()
        return line


def error_logger(trt: Any, write: Callable[[str, str], None] | None = None) -> Listener:
    """A listener to the module `trt`.

    The library uses the logger of the first builder or runtime for all of them, until all are gone
    (github.com/NVIDIA/TensorRT/issues/1475). So the process has one logger, which passes messages on to listeners.

    Args:
        write: gets the level and the text of every message, from the most serious to the most verbose.
    """
    with _LOCK:
        native = _NATIVE.get(trt) or _NATIVE.setdefault(trt, _native(trt.ILogger))
        listener = Listener(native, write)
        alive = [reference for reference in native.listeners if reference() is not None]
        native.listeners = [*alive, weakref.ref(listener)]
    return listener


_NATIVE: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _native(base: Any) -> Any:
    class Logger(base):
        """Passes messages on to the listeners."""

        def __init__(self) -> None:
            # pybind11 wants the base's own constructor called, not super()'s
            base.__init__(self)
            self.listeners: list[weakref.ref[Listener]] = []

        def log(self, severity: Any, message: str) -> None:
            for reference in self.listeners:
                if (listener := reference()) is not None:
                    listener.add(severity.name, message)

    return Logger()


def start(make: Callable[[Any], T], logger: Listener, name: str) -> T:
    """A Builder or Runtime, `make(logger.native)`; `name` ends in the library's name and version.

    Raises UserError where the library cannot start: its binding then raises TypeError.
    """
    try:
        return make(logger.native)
    except TypeError as error:
        driver = driver_version()
        serves = f"the driver serves CUDA {driver}" if driver else "this machine has no NVIDIA driver"
        library = name.rpartition(": ")[2].partition(" ")[0]
        hint = advice(library_name(library) if library in FLAVORS else library)
        hint = hint or "update the driver, or install the release for its CUDA version"
        raise UserError(f"{name} cannot start ({logger.take(error)}); {serves}", hint=hint) from error


@dataclass
class EngineHandle:
    """A deserialised engine, shared by all thread contexts."""

    path: Path
    trt: Any
    library: str
    """Name and version, as tensorrt 11.4.0."""
    logger: Any
    native: Any
    """The library's object."""
    graphs: Literal["captured", "library", "off"]
    """CUDA graphs: captured here, by the library itself, or none."""
    context_options: Callable[[], Any] | None
    """For TensorRT-RTX: makes the runtime configuration of one context."""
    batch: BatchProfiles
    image_shape: tuple[int, int, int]
    input: InputContract
    embedding: EmbeddingContract
    graphs_failed: Callable[[str], None]
    """Called with the reason when runs go on without graphs."""

    def checked(self, call: str, make: Callable[[], T]) -> T:
        """What `make` returns. Raises UserError, with the library's errors, for a call that fails: TensorRT returns
        False or None where its binding does not raise."""
        self.logger.errors.clear()
        try:
            result = make()
        except RuntimeError as error:
            raise self._failure(call, self.logger.take(error)) from error
        if result is None or result is False:
            raise self._failure(call, self.logger.take())
        return result

    def _failure(self, call: str, reason: str) -> UserError:
        problem = f"{self.library}: {call} failed ({reason})"
        if "memory" in reason.lower():
            return OutOfMemory(problem, path=self.path, hint="free GPU memory, or build it for fewer images (--batch)")
        return UserError(problem, path=self.path)


def layer_times(
    trt: Any, context: Any, run: Callable[[], None], report: Callable[[], None], runs: int
) -> dict[str, float]:
    """Layer -> median ms of `runs` runs, in the order of the library's reports.

    The library's profiler is called once per layer and run. Nothing is reported of runs that were captured as a CUDA
    graph without a profiler (NvInferRuntime.h, IExecutionContext::reportToProfiler).

    Args:
        context: an execution context whose shapes are set.
        run: executes it, and returns when the work is done.
        report: calls `context.report_to_profiler`, or raises.
    """

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            # pybind11 wants the base's own constructor called, not super()'s
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    profiler = Profiler()
    context.profiler = profiler
    context.enqueue_emits_profile = False  # else the library waits for each run
    reports: list[dict[str, float]] = []
    for _ in range(WARM_UP + runs):
        profiler.times = {}
        run()
        report()
        reports.append(profiler.times)
    return {name: median(times.get(name, 0.0) for times in reports[WARM_UP:]) for name in reports[-1]}
