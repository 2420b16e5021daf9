"""ONNX Runtime, on the CPU or through its CUDA provider. Needs no torch."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pmm.data.crops import Crops
from pmm.errors import Unavailable, UserError
from pmm.machine import clashing_wheels, compute_threads, cuda_index, gpu_at, nvidia_gpus
from pmm.manifest import Manifest
from pmm.onnx_file import read_onnx
from pmm.runtime.base import Embeddings, Runner, RunnerInfo, Step, in_runs, warn_if_unverified
from pmm.runtime.cuda_graph import GRAPHS_KEPT, bucket
from pmm.runtime.fork import refuse_parents_gpu
from pmm.runtime.memory import batch_fits, reason
from pmm.runtime.ort_cuda import CUDA, CUDA_FAILURE, CudaFailure, fell_back, mend, preload
from pmm.runtime.placed import NO_GRAPH, Placed, PlacedStep
from pmm.runtime.tf32 import has_tf32

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": CUDA}
COMPUTED = {("fp16", "cpu"): "fp32", ("int8", "cuda"): "fp32"}
"""Precision of the file and device, where ONNX Runtime has no products in it: what it computes them in."""
SEARCH = "HEURISTIC"
"""How cuDNN's convolutions are chosen. ONNX Runtime's own setting, EXHAUSTIVE, searches long, and again whenever a
batch has another size than the one before it; with HEURISTIC cuDNN says at once what it expects to be fastest. Batches
of changing sizes are what is served, and a bench times what is served, so it is one setting for all runs."""
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
            device: cpu, cuda, cuda:N, or auto: the GPU where ONNX Runtime can use one.
            threads: CPU threads (0: as many as cores, or as a quota of CPU time allows).
            tf32: let the products of an fp32 file run in TF32.
            cuda_graph: capture the work of a few batch sizes once, and replay it with one launch; a call runs as the
                next larger of them.
            warn: about embeddings that were never verified.

        Raises:
            UserError: the file is not ours, was changed, cannot run here, or the device is not really used.
            Unavailable: ONNX Runtime, the device, or what was asked of it is missing here.
        """
        file = read_onnx(path)
        self._path, self.manifest = path, file.manifest
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        holds, auto = self.manifest.precision_found, device == "auto"
        for_cpus = (self.manifest.quantization or {}).get("target") == "cpu"
        device = "cpu" if auto and for_cpus else _resolved(device)
        _check_request(str(path), device, holds, tf32, cuda_graph)
        # from the bytes that were hashed: the file cannot change in between
        options: dict[str, Any] = {"threads": threads, "tf32": tf32, "cuda_graph": cuda_graph}
        why = ""
        try:
            self.session = open_session(file.content, str(path), device, **options)
            why = fell_back(_import(), self.session) if auto and device != "cpu" else ""
            if device != "cpu" and not why and not cuda_graph:
                self._run_one(str(path))
        except CudaFailure as error:
            if not auto:
                raise
            why = str(error)
        if why:
            logging.getLogger("pmm").warning("%s: runs on the CPU: %s", path, why)
            device = "cpu"
            _check_request(str(path), device, holds, tf32, cuda_graph)
            self.session = open_session(file.content, str(path), device, **options)
        _check_interface(self.session, self.manifest, str(path))
        if warn:
            warn_if_unverified(Path(path), self.manifest)
        self.cuda_graph = cuda_graph
        self._gpu, self._lock = cuda_index(device), threading.Lock()
        kind = "cpu" if self._gpu is None else "cuda"
        self._kept: dict[int, Placed] = {}
        evidence = _evidence(self.session, device, str(path))
        if cuda_graph:
            self._capture_one(str(path))
        self.info = RunnerInfo(
            backend=f"ort-{kind}",
            device="cpu" if self._gpu is None else gpu_at(self._gpu).name,
            precision="tf32" if tf32 else COMPUTED.get((holds, kind), holds),
            provider=f"onnxruntime {_import().__version__} {evidence}"
            f"{'' if self._gpu is None else f', cuDNN {SEARCH}'}{', CUDA graph' if cuda_graph else ''}",
        )

    def __call__(self, images: Crops) -> Embeddings:
        self.check(images)
        return in_runs(self._run, images, self.manifest.input.batch)

    def _run(self, images: Crops) -> Embeddings:
        feed = self.manifest.input.feed(images, self.preprocessing)
        if not self.cuda_graph:
            with batch_fits(len(feed)):
                return self.session.run([self.embedding.name], {self.manifest.input.name: feed})[0]
        if not len(feed):
            return np.empty((0, self.embedding.dim), np.float32)
        with self._lock, batch_fits(len(feed)):
            placed = self._placed((bucket(len(feed), sys.maxsize), *feed.shape[1:]))
            placed.upload(feed)
            placed.run()
            return placed.download()[: len(feed)]

    def bind(self, images: Crops) -> Step:
        """As `Runner.bind`; on a GPU the step has the images there, and leaves the embeddings there.

        Raises UserError for no images on a GPU, and for another number than a static batch.
        """
        self.check(images)
        self.manifest.input.check_batch(len(images), self._path)
        feed = self.manifest.input.feed(images, self.preprocessing)
        if self._gpu is not None:
            if not len(feed):
                raise UserError("cannot bind 0 images; a run on a GPU takes 1 or more")
            with self._lock, batch_fits(len(feed)):
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
        placed = Placed(self.session, self.manifest.input, self.embedding, shape, graph, self._gpu or 0)
        if graph != NO_GRAPH:
            self._kept[batch] = placed
        return placed

    def _run_one(self, name: str) -> None:
        """A run of the fewest images now: whether cuDNN is there, and for this CUDA, shows only then."""
        given = self.manifest.input
        black = np.zeros((given.batch or 1, *given.shape(self.preprocessing)), given.dtype)
        try:
            self.session.run([self.embedding.name], {given.name: black})
        except Exception as error:  # ORT raises its own exception types
            if not CUDA_FAILURE.search(str(error)):
                raise UserError(f"{name}: ONNX Runtime cannot run it ({reason(error)})") from error
            said = f"{name}: ONNX Runtime cannot run it on the GPU ({reason(error)})"
            raise CudaFailure(said + mend(_import(), reason(error))) from error

    def _capture_one(self, name: str) -> None:
        """A run of one image now: whether the graph can be captured shows only then."""
        try:
            self(np.zeros((1, self.preprocessing.height, self.preprocessing.width, 3), np.uint8))
        except Exception as error:  # ORT raises its own exception types
            raise UserError(f"{name}: ONNX Runtime cannot run it as a CUDA graph ({reason(error)})") from error


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
        device: cpu, cuda or cuda:N.
        optimise: let ONNX Runtime rewrite the graph.
        tf32, cuda_graph: as `OrtRunner` has them, on cuda.

    Raises:
        UserError: ONNX Runtime is missing or installed twice, or refuses the graph.
        CudaFailure: CUDA refused.
    """
    ort, gpu = _import(), cuda_index(device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or compute_threads()
    options.log_severity_level = 4  # its errors reach the user as ours
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # where 8-bit products are summed in 16 bits (see pmm.machine.int8_overflows), exact sums: a few percent slower
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # TF32 is on by default in ONNX Runtime; fp32 must be fp32
    on_gpu = {
        "device_id": gpu,
        "use_tf32": int(tf32),
        "enable_cuda_graph": int(cuda_graph),
        "cudnn_conv_algo_search": SEARCH,
    }
    provider = (PROVIDERS["cpu"], {}) if gpu is None else (PROVIDERS["cuda"], on_gpu)
    if gpu is not None:
        preload(ort)
    try:
        # without the fallback: it would print, go on with the CPU, and do so again in the middle of the runs
        return ort.InferenceSession(content, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ORT raises its own exception types, one per kind of bad file
        said = f"{name}: ONNX Runtime cannot load it ({reason(error)})"
        if gpu is not None and CUDA_FAILURE.search(str(error)):
            raise CudaFailure(said + mend(ort, reason(error))) from error
        raise UserError(said) from error


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
    index = cuda_index(device)
    if device != "cpu":
        refuse_parents_gpu()
    providers = _import().get_available_providers()  # what was compiled: necessary, not sufficient
    usable = bool(nvidia_gpus()) and PROVIDERS["cuda"] in providers
    if device == "auto":
        return "cuda" if usable else "cpu"
    if index is not None and not usable:
        lacking = "no NVIDIA GPU is visible" if not nvidia_gpus() else "this ONNX Runtime has no CUDA provider"
        raise Unavailable(f"--device {device}: {lacking}; use --device cpu, or install onnxruntime-gpu and a driver")
    if index is not None:
        gpu_at(index)
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
    if tf32 and not has_tf32(gpu := gpu_at(cuda_index(device) or 0)):
        raise Unavailable(f"{name}: {gpu.name} has no TF32; run it in fp32")


def _evidence(session: Any, device: str, name: str) -> str:
    """Which provider really runs the graph, as strongly as this version can show it.

    Raises UserError if it is not the one asked for: ONNX Runtime falls back without a word.
    """
    wanted = PROVIDERS["cpu" if device == "cpu" else "cuda"]
    if device != "cpu" and (why := fell_back(_import(), session)):
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


def _check_interface(session: Any, manifest: Manifest, name: str) -> None:
    values = (*session.get_inputs(), *session.get_outputs())
    # a dynamic size is a name
    found = {v.name: ["any" if isinstance(v.shape[0], str) else v.shape[0], *v.shape[1:]] for v in values if v.shape}
    batch = manifest.input.batch or "any"
    promised = {
        manifest.input.name: [batch, *manifest.input.shape(manifest.preprocessing)],
        manifest.embedding.name: [batch, manifest.embedding.dim],
    }
    if found != promised:
        raise UserError(f"{name}: takes and gives {found}, its manifest promises {promised}")
