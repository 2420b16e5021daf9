"""ONNX Runtime, on the CPU or through its CUDA provider. Needs no torch."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pmm.data.crops import Crops
from pmm.errors import Unavailable, UserError
from pmm.machine import clashing_wheels, compute_threads, driver_version, nvidia_gpus
from pmm.manifest import Manifest
from pmm.onnx_file import read_onnx
from pmm.runtime.base import Embeddings, Runner, RunnerInfo, Step, warn_if_unverified
from pmm.runtime.cuda_graph import GRAPHS_KEPT
from pmm.runtime.fork import refuse_parents_gpu
from pmm.runtime.placed import NO_GRAPH, Placed, PlacedStep
from pmm.runtime.tf32 import has_tf32

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
COMPUTED = {("fp16", "cpu"): "fp32", ("int8", "cuda"): "fp32"}
"""Precision of the file and device, where ONNX Runtime has no products in it: what it computes them in."""
_PRODUCTS = ("Conv", "Gemm", "MatMul")


class OrtRunner(Runner):
    """An exported ONNX file in ONNX Runtime. Any thread may call it; CUDA graphs are replayed one at a time."""

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        threads: int = 0,
        *,
        tf32: bool = False,
        cuda_graph: bool = False,
        warn: bool = True,
    ) -> None:
        """Open `path`.

        Args:
            device: cpu, cuda, or auto: the GPU where ONNX Runtime can use one.
            threads: CPU threads (0: as many as cores, or as a quota of CPU time allows).
            tf32: let the products of an fp32 file run in TF32.
            cuda_graph: capture the work of each batch size once, and replay it with one launch.
            warn: about embeddings that were never verified.

        Raises:
            UserError: the file is not ours, was changed, cannot run here, or the device is not really used.
            Unavailable: ONNX Runtime, the device, or what was asked of it is missing here.
        """
        file = read_onnx(path)
        self.manifest = file.manifest
        holds, auto = self.manifest.precision_found, device == "auto"
        for_cpus = (self.manifest.quantization or {}).get("target") == "cpu"
        device = "cpu" if auto and for_cpus else _resolved(device)
        _check_request(str(path), device, holds, tf32, cuda_graph)
        # from the bytes that were hashed: the file cannot change in between
        self.session = open_session(file.content, str(path), device, threads, tf32=tf32, cuda_graph=cuda_graph)
        if auto and device == "cuda" and (why := _fell_back(self.session)):
            logging.getLogger("pmm").warning("%s: runs on the CPU: %s", path, why)
            device = "cpu"
            _check_request(str(path), device, holds, tf32, cuda_graph)
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        _check_interface(self.session, self.manifest, str(path))
        if warn:
            warn_if_unverified(Path(path), self.manifest)
        self.cuda_graph = cuda_graph
        self._on_gpu, self._lock = device == "cuda", threading.Lock()
        self._kept: dict[int, Placed] = {}
        evidence = _evidence(self.session, device, str(path))
        if cuda_graph:
            self._capture_one(str(path))
        self.info = RunnerInfo(
            backend=f"ort-{device}",
            device=nvidia_gpus()[0].name if device == "cuda" else "cpu",
            precision="tf32" if tf32 else COMPUTED.get((holds, device), holds),
            provider=f"onnxruntime {_import().__version__} {evidence}{', CUDA graph' if cuda_graph else ''}",
        )

    def __call__(self, images: Crops) -> Embeddings:
        self.check(images)
        feed = self.manifest.input.feed(images, self.preprocessing)
        if not self.cuda_graph:
            return self.session.run([self.embedding.name], {self.manifest.input.name: feed})[0]
        if not len(feed):
            return np.empty((0, self.embedding.dim), np.float32)
        with self._lock:
            placed = self._placed(feed.shape)
            placed.upload(feed)
            placed.run()
            return placed.download()

    def bind(self, images: Crops) -> Step:
        """As `Runner.bind`; on a GPU the step has the images there, and leaves the embeddings there.

        Raises UserError for no images on a GPU.
        """
        self.check(images)
        feed = self.manifest.input.feed(images, self.preprocessing)
        if self._on_gpu:
            if not len(feed):
                raise UserError("cannot bind 0 images; a run on a GPU takes 1 or more")
            with self._lock:
                return PlacedStep(self._placed(feed.shape), feed.copy(), self._lock)
        binding = self.session.io_binding()
        binding.bind_cpu_input(self.manifest.input.name, feed)
        binding.bind_output(self.embedding.name, "cpu")

        def step() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return Step(step)

    def _placed(self, shape: tuple[int, ...]) -> Placed:
        """With CUDA graphs, the one place for images of this shape, up to a number of them: ONNX Runtime lets go of no
        graph. Else a new one."""
        batch = shape[0]
        if batch in self._kept:
            return self._kept[batch]
        graph = batch if self.cuda_graph and len(self._kept) < GRAPHS_KEPT else NO_GRAPH
        placed = Placed(self.session, self.manifest.input, self.embedding, shape, graph)
        if graph != NO_GRAPH:
            self._kept[batch] = placed
        return placed

    def _capture_one(self, name: str) -> None:
        """A run of one image now: whether the graph can be captured shows only then."""
        try:
            self(np.zeros((1, self.preprocessing.height, self.preprocessing.width, 3), np.uint8))
        except Exception as error:  # ORT raises its own exception types
            raise UserError(f"{name}: ONNX Runtime cannot run it as a CUDA graph ({_reason(error)})") from error


def open_session(
    content: bytes,
    name: str = "graph",
    device: str = "cpu",
    threads: int = 0,
    *,
    optimise: bool = True,
    tf32: bool = False,
    cuda_graph: bool = False,
) -> Any:
    """An onnxruntime.InferenceSession on one provider, recording where each operator goes.

    Args:
        name: of the file, for messages.
        device: cpu or cuda.
        optimise: let ONNX Runtime rewrite the graph.
        tf32, cuda_graph: as `OrtRunner` has them, on cuda.

    Raises:
        UserError: ONNX Runtime is missing or installed twice, or refuses the graph.
    """
    ort = _import()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or compute_threads()
    options.log_severity_level = 4  # its errors reach the user as ours
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # where 8-bit products are summed in 16 bits (see pmm.machine.int8_overflows), exact sums: a few percent slower
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # TF32 is on by default in ONNX Runtime; fp32 must be fp32
    on_gpu = {"use_tf32": int(tf32), "enable_cuda_graph": int(cuda_graph)}
    provider = (PROVIDERS[device], on_gpu if device == "cuda" else {})
    if device == "cuda":
        _preload(ort)
    try:
        # without the fallback: it would print, go on with the CPU, and do so again in the middle of the runs
        return ort.InferenceSession(content, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ORT raises its own exception types, one per kind of bad file
        raise UserError(f"{name}: ONNX Runtime cannot load it ({_reason(error)})") from error


def _preload(ort: Any) -> None:
    """Find the CUDA libraries in the nvidia packages: the provider knows no place to look for them, and only a process
    that has imported torch has them already."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; `_fell_back` says it
            ort.preload_dlls()


def _fell_back(session: Any) -> str:
    """Where ONNX Runtime runs instead of on the GPU, the reason of the system's loader, and what to do; empty if it
    runs there."""
    first = session.get_providers()[0]
    if first == PROVIDERS["cuda"]:
        return ""
    ort, said = _import(), ""
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    try:  # only now: loaded before ONNX Runtime does it, the library would not find its host
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as error:
        said = f" ({error})"
    version = getattr(ort, "cuda_version", "") or ""
    return (
        f"ONNX Runtime fell back to {first}{said}; this one is built for CUDA {version or 'of another version'} and "
        f"cuDNN 9, the driver serves CUDA {driver_version() or 'of no version'}: pip install "
        '"onnxruntime-gpu[cuda,cudnn]"'
    )


def _import() -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Unavailable(
            "running ONNX files needs ONNX Runtime: pip install onnxruntime-gpu (or onnxruntime)"
        ) from error
    if clash := clashing_wheels():
        raise UserError(clash)
    ort.disable_telemetry_events()  # nobody asked for it to be sent
    return ort


def _resolved(device: str) -> str:
    """Turn "auto" into "cuda" where a GPU and the provider are, else "cpu". Raises UserError for what cannot be had."""
    if device != "cpu":
        refuse_parents_gpu()
    providers = _import().get_available_providers()  # what was compiled: necessary, not sufficient
    usable = bool(nvidia_gpus()) and PROVIDERS["cuda"] in providers
    if device == "auto":
        return "cuda" if usable else "cpu"
    if device not in PROVIDERS:
        raise UserError(f"unknown device '{device}'; known: auto, {', '.join(PROVIDERS)}")
    if device == "cuda" and not usable:
        lacking = "no NVIDIA GPU is visible" if not nvidia_gpus() else "this ONNX Runtime has no CUDA provider"
        raise Unavailable(f"--device cuda: {lacking}; use --device cpu, or install onnxruntime-gpu and a driver")
    return device


def _check_request(name: str, device: str, holds: str, tf32: bool, cuda_graph: bool) -> None:
    """Raises UserError for what cannot be had of a file that `holds` this precision, on this device."""
    if holds == "bf16" and device == "cpu":
        raise Unavailable(
            f"{name}: ONNX Runtime has no bf16 convolution for CPUs; use a GPU, build an engine "
            "(export/to_trt.py), or export another precision"
        )
    if device == "cpu" and (tf32 or cuda_graph):
        raise Unavailable(f"{name}: {'TF32' if tf32 else 'a CUDA graph'} was asked for, and a CPU has no such thing")
    if tf32 and holds != "fp32":
        raise UserError(f"{name}: TF32 is for the products of an fp32 file, and this one holds {holds}")
    if tf32 and not has_tf32(nvidia_gpus()[0]):
        raise Unavailable(f"{name}: {nvidia_gpus()[0].name} has no TF32; run it in fp32")


def _evidence(session: Any, device: str, name: str) -> str:
    """Which provider really runs the graph, as strongly as this version can show it.

    Raises UserError if it is not the one asked for: ONNX Runtime falls back without a word.
    """
    wanted = PROVIDERS[device]
    if device == "cuda" and (why := _fell_back(session)):
        raise UserError(f"{name}: asked for {wanted}, but {why}; refusing to run")
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return wanted
    placed = [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info()
              for node in part.get_nodes()]  # fmt: skip
    elsewhere = Counter(provider for provider, operator in placed if provider != wanted and operator in _PRODUCTS)
    if elsewhere:
        where = ", ".join(f"{count} on {provider}" for provider, count in elsewhere.items())
        raise UserError(f"{name}: asked for {wanted}, but convolutions or matrix products run elsewhere: {where}")
    return f"{wanted} ({sum(provider == wanted for provider, _ in placed)} of {len(placed)} operators)"


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _check_interface(session: Any, manifest: Manifest, name: str) -> None:
    found = {value.name: list(value.shape)[1:] for value in (*session.get_inputs(), *session.get_outputs())}
    promised = {
        manifest.input.name: list(manifest.input.shape(manifest.preprocessing)),
        manifest.embedding.name: [manifest.embedding.dim],
    }
    if found != promised:
        raise UserError(f"{name}: takes and gives {found} per image, its manifest promises {promised}")
