"""Every backend: which files it runs, where, in which precisions, and how it opens one. Loads none before that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pmm.artifacts.artifact import read_manifest
from pmm.artifacts.kinds import KIND_NAMES, RUNNABLE, Kind, require_kind
from pmm.runtime.base import Runner
from pmm.runtime.trt_variant import library_name
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue, one_of
from pmm.utils.extras import import_library
from pmm.utils.hardware import check_threads, cuda_index

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run a file."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where there is one that the backend can use."""
    threads: int = 0
    """CPU threads (0: the backend's default)."""
    precision: str = ""
    """To compute in, where a file leaves a choice (see `open_runner`). Empty: as the file is."""
    cuda_graph: bool | None = None
    """Replay runs as CUDA graphs (default: TensorRT does, the others do not)."""
    eager: bool = False
    """Let TensorRT-RTX compile the kernels of a new batch size before its first run, not beside the runs."""
    warn: bool = True
    """About embeddings that were never verified."""


@dataclass(frozen=True)
class Backend:
    """What executes a model."""

    file_kind: Kind
    library: str
    """Module that must be importable."""
    precisions: dict[Device, tuple[str, ...]]
    """Per device, those that it computes in: ONNX Runtime runs fp16 files in fp32 on a CPU."""
    open: Callable[[Path, RunOptions], Runner]

    def load_library(self) -> None:
        """Import it. Raises MissingLibrary, whose hint installs it."""
        import_library(self.library)


def open_runner(
    artifact: str | Path,
    backend: str = "auto",
    *,
    device: str = "auto",
    threads: int = 0,
    precision: str = "",
    cuda_graph: bool | None = None,
) -> Runner:
    """Open a checkpoint, an ONNX file, an AOTInductor package or an engine, whatever its name ends in.

    Args:
        artifact: the file.
        backend: a name of `BACKENDS`; onnxruntime, which is ort-cuda or ort-cpu, as `device` says; or auto: torch for a
            checkpoint, onnxruntime for an ONNX file, aoti for a package, and for an engine the library that built it.
        device: cpu, cuda, cuda:N, or auto: the GPU where there is one that the backend can use.
        threads: CPU threads of the backend (0: its default).
        precision: to compute in, where the file leaves a choice: fp32, tf32, fp16 or bf16 for a checkpoint, tf32 or
            bf16 for an fp32 ONNX file. Empty: as the file is.
        cuda_graph: replay runs as CUDA graphs (default: TensorRT does, the others do not).

    Raises:
        InvalidFile: the file fails its checks, or is for other backends (which are named).
        InvalidValue, ConflictingOptions: an unknown backend or device, or one without the other.
        BackendUnavailable: a library or a device is missing here.

    Examples:
        >>> with pmm.open_runner("best.onnx", device="cpu") as runner:
        ...     crops = pmm.load_crops("query.jpg", runner.preprocessing)  # uint8 RGB [1, H, W, 3]
        ...     embeddings = runner(crops)
        >>> embeddings.shape == (1, runner.embedding.dim), runner.info.backend, runner.info.precision
        (True, 'ort-cpu', 'fp32')
    """
    cuda_index(device)  # an unknown word is refused before the file is read
    check_threads(threads)
    path = Path(artifact)
    name, device = _choose(path, backend, device)
    if BACKENDS[name].library == "torch":  # the others are imported where a file is opened
        BACKENDS[name].load_library()
    options = RunOptions(device=device, threads=threads, precision=precision, cuda_graph=cuda_graph)
    runner = BACKENDS[name].open(path, options)
    if precision not in ("", runner.info.precision):
        runner.close()
        raise InvalidFile(f"{runner.info.provider} runs it in {runner.info.precision}", path=path, expected=precision)
    return runner


def _choose(path: Path, backend: str, device: str) -> tuple[str, str]:
    """The backend for a file, and the device for the backend."""
    check_backend(backend)
    kind = require_kind(path, *RUNNABLE)
    able = backends_for(kind)
    if backend == "auto" or (backend == ONNXRUNTIME and kind == "onnx"):
        return able[0], device  # of ONNX Runtime on any device, of engines of either library
    if kind == "engine" and backend in able:
        manifest = read_manifest(path)
        if manifest and manifest.engine:
            able = [library_name(manifest.engine.flavor)]
    if backend not in able:
        name = f"an engine of {able[0]}" if kind == "engine" and len(able) == 1 else KIND_NAMES[kind]
        raise InvalidFile(
            f"it is {name}, which {backend} does not run", path=path, hint=f"use --backend {one_of(able)}"
        )
    devices = BACKENDS[backend].precisions
    if device == "auto":
        return backend, device if len(devices) > 1 else next(iter(devices))
    kind_of_device: Device = "cpu" if device == "cpu" else "cuda"
    alternatives = [name for name in able if kind_of_device in BACKENDS[name].precisions]
    if kind_of_device not in devices and alternatives:
        hint = f"use --backend {one_of(alternatives)} to run {path} on it"
        raise ConflictingOptions(f"{backend} does not run on --device {device}", "--backend", "--device", hint=hint)
    return backend, device


def check_backend(name: str) -> None:
    """Raises InvalidValue for a backend that `open_runner` does not know."""
    words = ("auto", ONNXRUNTIME, *BACKENDS)
    if name not in words:
        raise InvalidValue("backend", name, choices=words)


def backends_for(kind: Kind) -> list[str]:
    """The backends that run such a file, the usual one first."""
    return [name for name, backend in BACKENDS.items() if backend.file_kind == kind]


def _torch(path: Path, options: RunOptions, *, compiled: bool = False) -> Runner:
    """The checkpoint as it is, in fp32 and tf32; compiled, in half precision or as a CUDA graph the deployed graph."""
    precision = options.precision or "fp32"
    if precision not in (known := sorted({*_TORCH["cpu"], *_TORCH["cuda"]})):
        raise InvalidValue("precision", precision, choices=known)
    if precision in ("fp32", "tf32") and not compiled and not options.cuda_graph:
        from pmm.runtime.eager import EagerRunner

        return EagerRunner.open(path, options.device, options.threads, tf32=precision == "tf32")
    from pmm.runtime.torch_graph import GraphRunner

    return GraphRunner.open(
        path, options.device, precision, options.threads, compiled=compiled, cuda_graph=bool(options.cuda_graph)
    )


def _aoti(path: Path, options: RunOptions) -> Runner:
    from pmm.runtime.aoti import AotiRunner

    return AotiRunner(path, options.device, options.threads, cuda_graph=bool(options.cuda_graph), warn=options.warn)


def _onnxruntime(path: Path, options: RunOptions) -> Runner:
    from pmm.runtime.ort import OrtRunner

    return OrtRunner(
        path,
        options.device,
        options.threads,
        tf32=options.precision == "tf32",
        cuda_graph=bool(options.cuda_graph),
        warn=options.warn,
    )


def _openvino(path: Path, options: RunOptions) -> Runner:
    from pmm.runtime.openvino import OpenVinoRunner

    return OpenVinoRunner(path, options.threads, precision=options.precision or None, warn=options.warn)


def _engine(path: Path, options: RunOptions) -> Runner:
    from pmm.runtime.trt import TrtRunner

    graphs = options.cuda_graph is not False
    return TrtRunner(path, options.device, cuda_graph=graphs, eager=options.eager, warn=options.warn)


_TORCH: dict[Device, tuple[str, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "fp16", "bf16")}
_ENGINE: dict[Device, tuple[str, ...]] = {"cuda": ("fp32", "tf32", "fp16", "bf16", "int8")}
BACKENDS = {
    "torch": Backend("checkpoint", "torch", _TORCH, _torch),
    "torch-compile": Backend("checkpoint", "torch", _TORCH, partial(_torch, compiled=True)),
    "aoti": Backend("package", "torch", _TORCH, _aoti),
    "ort-cpu": Backend("onnx", "onnxruntime", {"cpu": ("fp32", "int8")}, _onnxruntime),
    "ort-cuda": Backend("onnx", "onnxruntime", {"cuda": ("fp32", "tf32", "fp16", "bf16")}, _onnxruntime),
    "tensorrt": Backend("engine", "tensorrt", _ENGINE, _engine),
    "tensorrt-rtx": Backend("engine", "tensorrt_rtx", _ENGINE, _engine),
    "openvino": Backend("onnx", "openvino", {"cpu": ("fp32", "bf16", "int8")}, _openvino),
}
"""Name -> backend, those for one kind of file in the order of preference. What to install for a library is in
`pmm.utils.extras`, what a kind of file is in `pmm.artifacts.kinds`; the bench exports files for each
(`pmm.bench.candidates`), and its reports have a name and a colour for it (`pmm.bench.pages`)."""
ONNXRUNTIME = "onnxruntime"
"""Also a name: ort-cuda or ort-cpu, as the device is."""
BACKEND_HELP = (
    f"What runs it: auto, or for a checkpoint {' or '.join(backends_for('checkpoint'))}, for an ONNX file "
    f"{ONNXRUNTIME} ({' or '.join(backends_for('onnx')[:2])}) or openvino, for a package aoti, for an engine "
    f"{' or '.join(backends_for('engine'))}."
)
