"""What can be measured: backends, their precisions, and why this machine cannot run one. Loads no backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pmm.artifacts.kinds import Kind, kind_of
from pmm.artifacts.manifest import PRECISIONS, Manifest
from pmm.artifacts.origin import manifest_of
from pmm.runtime.open import BACKENDS, Device
from pmm.runtime.trt_variant import FLAVORS, TF32_ON
from pmm.utils.errors import ConflictingOptions, InvalidValue, one_of
from pmm.utils.extras import install_command
from pmm.utils.hardware import RTX_CAPABILITIES, clashing_wheels, cuda_index, gpu_at, nvidia_gpus

Source = Literal["checkpoint", "onnx"]
"""A checkpoint of pmm train or an adopted network, or an adopted ONNX file."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One backend in one precision on one device."""

    backend: str
    precision: str
    device: Device
    gpu: int = 0
    """Its number, on cuda."""
    cuda_graph: bool | None = None
    """None without a GPU: there is no such thing."""
    artifact: Path | None = None
    """The file that the user gave; None: to be exported from the source, unless it runs that itself."""
    source: Source = "checkpoint"
    """What kind of file all others are exported from."""

    @property
    def name(self) -> str:
        """Unique in a run: "ort-cpu int8", "tensorrt fp16 graph", "ort-cpu fp32 model.onnx"."""
        parts = [self.backend, self.precision, "graph" if self.cuda_graph else "", self.artifact and self.artifact.name]
        return " ".join(str(part) for part in parts if part)

    @property
    def device_name(self) -> str:
        """Its device, as an argument of a runner: cpu, cuda or cuda:N."""
        return f"{self.device}:{self.gpu}" if self.gpu else self.device

    @property
    def file_kind(self) -> Kind:
        """What kind of file it runs."""
        return BACKENDS[self.backend].file_kind

    @property
    def file_precision(self) -> str:
        """Precision of the file: TF32 is a way to run one in fp32, as bf16 is in OpenVINO."""
        in_fp32 = self.precision == "tf32" or (self.backend, self.precision) == ("openvino", "bf16")
        return "fp32" if in_fp32 else self.precision

    @property
    def flavor(self) -> str:
        """Of an engine's builder: tensorrt or rtx."""
        return next(flavor for flavor, library in FLAVORS.items() if library == BACKENDS[self.backend].library)

    def unavailable_reason(self) -> str:
        """Why this machine cannot run it, in a few words; empty if it can."""
        backend = BACKENDS[self.backend]
        if self.source == "onnx" and self.file_kind in ("checkpoint", "package"):
            return "an adopted ONNX file holds no network that torch can run"
        if self.device == "cuda" and not nvidia_gpus() and not self.builds_without_gpu:
            return "no NVIDIA GPU here"
        if self.backend == "tensorrt-rtx" and (gpus := nvidia_gpus()):
            capability = gpus[self.gpu].compute_capability
            if capability not in RTX_CAPABILITIES:
                return f"TensorRT-RTX does not run on compute capability {capability}"
        if self.precision not in backend.precisions.get(self.device, ()):
            return f"{self.backend} does not compute in {self.precision} on {self.device}"
        if not find_spec(backend.library):
            return f"not installed: {install_command(backend.library)}"
        if backend.library == "onnxruntime" and (clash := clashing_wheels()):
            return clash
        return ""

    @property
    def builds_without_gpu(self) -> bool:
        """Its engine can be built, though not run, where there is no GPU."""
        return self.backend == "tensorrt-rtx"

    def cannot_run_reason(self) -> str:
        """Why its file, once built, cannot run here; empty if it can."""
        if self.device == "cuda" and not nvidia_gpus():
            return "engine built, but there is no NVIDIA GPU here to run it on"
        return ""


def export_candidates(
    backends: Sequence[str],
    precisions: Sequence[str],
    *,
    source: Source = "checkpoint",
    device: str = "auto",
    cuda_graph: str = "both",
) -> list[Candidate]:
    """The candidates that `--backends` and `--precisions` name; the reference, the source's own run in fp32 (by torch,
    or of an adopted ONNX file by ONNX Runtime on the CPU), always comes first.

    Args:
        backends: names, or "auto" (those that fit this machine best) or "all".
        precisions: names, or "auto" (fp32, int8 and, on a GPU, fp16) or "all".
        source: what kind of file the others are exported from.
        device: where torch, torch-compile and aoti run: cpu, cuda, cuda:N, or auto (the GPU where there is one); N is
            for the other backends, too.
        cuda_graph: on, off, or both, on a GPU.

    Raises:
        InvalidValue: an unknown backend, precision, device or choice of graphs.
        ConflictingOptions: no backend runs in one of the precisions, or one in none of them.
    """
    gpu = bool(nvidia_gpus())
    where, number = _device(device), cuda_index(device) or 0
    auto = ["torch"] * (source == "checkpoint") + (["ort-cuda", "tensorrt"] if gpu else ["ort-cpu", "openvino"])
    names = _expanded(backends, list(BACKENDS), auto, "--backends")
    usual = ["fp32", "fp16", "int8"] if gpu else ["fp32", "int8"]
    kinds = _expanded(precisions, list(PRECISIONS), usual, "--precisions")
    if cuda_graph not in ("on", "off", "both"):
        raise InvalidValue("--cuda-graph", cuda_graph, choices=("on", "off", "both"))
    graphs = {"on": [True], "off": [False], "both": [False, True]}[cuda_graph]
    candidates = [_reference(source, where, number)]
    for name in names:
        devices = BACKENDS[name].precisions
        on: Device = where if where in devices else next(iter(devices))
        candidates += [
            Candidate(
                backend=name,
                precision=precision,
                device=on,
                gpu=number if on == "cuda" else 0,
                cuda_graph=graph,
                source=source,
            )
            for precision in kinds
            if precision in devices[on]
            for graph in (graphs if on == "cuda" and gpu else [None])
        ]
    _check_each_runs(candidates, backends, precisions, names, kinds)
    return list(dict.fromkeys(candidates))


def _reference(source: Source, device: Device, gpu: int) -> Candidate:
    """The source's own run in fp32, which the others are compared with."""
    if source == "onnx":
        return Candidate(backend="ort-cpu", precision="fp32", device="cpu", source=source)
    graph = False if device == "cuda" else None
    return Candidate(backend="torch", precision="fp32", device=device, gpu=gpu, cuda_graph=graph)


def _check_each_runs(
    candidates: Sequence[Candidate],
    backends: Sequence[str],
    precisions: Sequence[str],
    names: Sequence[str],
    kinds: Sequence[str],
) -> None:
    """Raises ConflictingOptions if none of the `candidates` runs in one of the `backends`, or one of the `precisions`,
    that the user named; `names` and `kinds` are what these stand for."""
    for name in (name for name in backends if name in BACKENDS and name not in {c.backend for c in candidates}):
        usable = one_of(next(iter(BACKENDS[name].precisions.values())))
        problem = f"{name} does not run in {one_of(kinds)}"
        raise ConflictingOptions(problem, "--backends", "--precisions", expected=f"--precisions {usable}")
    for precision in (p for p in precisions if p in PRECISIONS and p not in {c.precision for c in candidates}):
        usable = one_of(
            f"{name} on {device}"
            for name, backend in BACKENDS.items()
            for device, supported in backend.precisions.items()
            if precision in supported
        )
        problem = f"{one_of(names)} does not run in {precision} on this device"
        raise ConflictingOptions(problem, "--backends", "--precisions", expected=usable)


def artifact_candidates(
    artifacts: Sequence[Path], backends: Sequence[str] = (), *, device: str = "auto", cuda_graph: str = "both"
) -> list[tuple[Candidate, Manifest]]:
    """A candidate for each of the user's files: in the `backends` that run such a file, or else in the natural one;
    with CUDA graphs on a GPU, that of `device` if it is one, unless `cuda_graph` is off.

    Raises InvalidFile for a file that pmm did not export, or that was changed since.
    """
    number = cuda_index(device) or 0
    return [pair for path in artifacts for pair in _of_file(path, backends, number, cuda_graph != "off")]


def _of_file(path: Path, backends: Sequence[str], number: int, graphs: bool) -> Iterator[tuple[Candidate, Manifest]]:
    kind, manifest = kind_of(path), manifest_of(path)
    gpu = bool(nvidia_gpus())
    if kind == "engine":
        assert manifest.engine is not None
        natural = "tensorrt" if manifest.engine.flavor == "tensorrt" else "tensorrt-rtx"
    elif kind == "onnx":
        natural = "ort-cuda" if gpu and manifest.precision in BACKENDS["ort-cuda"].precisions["cuda"] else "ort-cpu"
    else:
        natural = "aoti"
    fitting = [name for name in backends if name in BACKENDS and BACKENDS[name].file_kind == kind]
    if kind == "engine":
        fitting = [name for name in fitting if name == natural]
    for name in fitting or [natural]:
        devices = BACKENDS[name].precisions
        on: Device = "cuda" if "cuda" in devices and (gpu or "cpu" not in devices) else "cpu"
        if manifest.package is not None:
            on = manifest.package.device
        in_tf32 = manifest.engine is not None and TF32_ON in manifest.engine.flags
        precision = "tf32" if in_tf32 else manifest.precision
        graph = graphs if on == "cuda" and gpu else None
        at = number if on == "cuda" else 0
        candidate = Candidate(backend=name, precision=precision, device=on, gpu=at, cuda_graph=graph, artifact=path)
        yield candidate, manifest


def _device(name: str) -> Device:
    """Raises InvalidValue for an unknown device, BackendUnavailable for a GPU that is not there."""
    number = cuda_index(name)
    if number is None:
        return "cuda" if name == "auto" and nvidia_gpus() else "cpu"
    gpu_at(number)
    return "cuda"


def _expanded(words: Sequence[str], known: Sequence[str], auto: Sequence[str], flag: str) -> list[str]:
    """The names that `words` stand for, each once."""
    unknown = [word for word in words if word not in (*known, "auto", "all")]
    if unknown:
        raise InvalidValue(flag, ", ".join(unknown), choices=(*known, "auto", "all"))
    groups = {"all": known, "auto": auto}
    return list(dict.fromkeys(name for word in words for name in groups.get(word, [word])))
