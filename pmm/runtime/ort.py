"""ONNX Runtime, on the CPU or through its CUDA provider. Needs no torch."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.preprocessing import Crops
from pmm.runtime.base import BoundRun, Embeddings, Runner, RunnerInfo, check_on_gpu, run_in_batches, warn_if_unverified
from pmm.runtime.cuda_graph import GRAPHS_KEPT, bucket
from pmm.runtime.driver import current_gpu
from pmm.runtime.gpu_array import DEFAULT_STREAM, CudaArray, GpuArray, gpu_array, is_on_gpu
from pmm.runtime.gpu_binding import NO_GRAPH, GpuBinding, GpuBoundRun
from pmm.runtime.memory import reason
from pmm.runtime.ort_session import (
    COMPUTED,
    CUDA_FAILURE,
    SEARCH,
    CudaFailure,
    check_interface,
    check_modes,
    cuda_fallback,
    cuda_hint,
    onnx_runtime,
    open_session,
    resolved_device,
    verify_provider,
)
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.hardware import cuda_index, gpu_at

T = TypeVar("T")


class OrtRunner(Runner):
    """An exported ONNX file in ONNX Runtime. Any thread may call it; CUDA graphs are replayed one at a time."""

    _path: Path

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
            InvalidFile: the file is not one of pmm export onnx, was changed, or ONNX Runtime refuses it.
            BackendUnavailable: ONNX Runtime or the device is missing, or has no such mode.
            UserError: ONNX Runtime does not use the device.
        """
        file = read_onnx(path)
        self._path, self.manifest = Path(path), file.manifest
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        self.method = self.manifest.method
        precision, auto = self.manifest.precision_found, device == "auto"
        for_cpus = (self.manifest.quantization or {}).get("target") in ("cpu", "opencv")
        device = "cpu" if auto and for_cpus else resolved_device(device)
        check_modes(path, device, precision, tf32, cuda_graph)
        # from the bytes that were hashed: the file cannot change in between
        with_fp16 = (self.manifest.quantization or {}).get("fallback") == "fp16"
        options: dict[str, Any] = {
            "threads": threads, "tf32": tf32, "cuda_graph": cuda_graph, "float_biases": with_fp16,
        }  # fmt: skip
        failure: CudaFailure | None = None
        try:
            self.session = open_session(file.content, str(path), device, **options)
            failure = cuda_fallback(self.session) if auto and device != "cpu" else None
            if device != "cpu" and not failure and not cuda_graph:
                self._run_one()
        except CudaFailure as error:
            if not auto:
                raise
            failure = error
        if failure:
            failure.path = None
            logging.getLogger("pmm").warning("%s: runs on the CPU: %s", path, failure)
            device = "cpu"
            check_modes(path, device, precision, tf32, cuda_graph)
            self.session = open_session(file.content, str(path), device, **options)
        check_interface(self.session, self.manifest, str(path))
        if warn:
            warn_if_unverified(Path(path), self.manifest)
        self.cuda_graph = cuda_graph
        self._gpu, self._lock = cuda_index(device), threading.Lock()
        self.accepts_gpu_arrays = self._gpu is not None
        kind = "cpu" if self._gpu is None else "cuda"
        self._bindings: dict[int, GpuBinding] = {}
        evidence = verify_provider(self.session, device, str(path))
        if cuda_graph:
            self._capture_one()
        self.info = RunnerInfo(
            backend=f"ort-{kind}",
            device="cpu" if self._gpu is None else gpu_at(self._gpu).name,
            precision="tf32" if tf32 else COMPUTED.get((precision, kind), precision),
            provider=f"onnxruntime {onnx_runtime().__version__} {evidence}"
            f"{'' if self._gpu is None else f', cuDNN {SEARCH}'}{', CUDA graph' if cuda_graph else ''}",
        )

    def _embed(self, images: Crops | CudaArray) -> Embeddings:
        if is_on_gpu(images):
            return self._run_on_gpu(images, lambda binding, count: binding.download()[:count])
        return run_in_batches(self._run, images, self.manifest.input.batch)  # type: ignore[arg-type]

    def _embed_on_gpu(self, images: Crops | CudaArray) -> GpuArray:
        return self._run_on_gpu(images, lambda binding, count: binding.copy_embeddings(count))

    def _run_on_gpu(self, images: Crops | CudaArray, finish: Callable[[GpuBinding, int], T]) -> T:
        """The result of `finish` after one run in memory of the GPU; it takes the binding and the number of images."""
        assert self._gpu is not None
        with current_gpu(self._gpu), self._lock:
            feed: npt.NDArray[Any] | GpuArray
            if is_on_gpu(images):
                feed = gpu_array(images, DEFAULT_STREAM)
                check_on_gpu(self, feed, self._gpu, self.manifest.input)
            else:
                feed = self.manifest.input.feed(images, self.preprocessing)  # type: ignore[arg-type]
            count = feed.shape[0]
            self.manifest.input.check_batch(count, self._path)
            batch = max(1, bucket(count, sys.maxsize) if self.cuda_graph else count)
            binding = self._binding((batch, *feed.shape[1:]))
            binding.copy_from_gpu(feed) if isinstance(feed, GpuArray) else binding.upload(feed)
            binding.run()
            return finish(binding, count)

    def _run(self, images: Crops) -> Embeddings:
        feed = self.manifest.input.feed(images, self.preprocessing)
        if not self.cuda_graph:
            return self.session.run([self.embedding.name], {self.manifest.input.name: feed})[0]
        if not len(feed):
            return np.empty((0, self.embedding.dim), np.float32)
        with self._lock:
            binding = self._binding((bucket(len(feed), sys.maxsize), *feed.shape[1:]))
            binding.upload(feed)
            binding.run()
            return binding.download()[: len(feed)]

    def _bind(self, images: Crops) -> BoundRun:
        """On a GPU the embeddings are not copied to the host."""
        self.manifest.input.check_batch(len(images), self._path)
        feed = self.manifest.input.feed(images, self.preprocessing)
        if self._gpu is not None:
            with self._lock:
                return GpuBoundRun(self._binding(feed.shape), feed.copy(), self._lock)
        binding = self.session.io_binding()
        binding.bind_cpu_input(self.manifest.input.name, feed)
        binding.bind_output(self.embedding.name, "cpu")

        def step() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return BoundRun(step)

    def _binding(self, shape: tuple[int, ...]) -> GpuBinding:
        """With CUDA graphs the binding of this shape, up to a number of shapes, as ONNX Runtime frees no graph; else
        a new one."""
        batch = shape[0]
        if batch in self._bindings:
            return self._bindings[batch]
        graph = batch if self.cuda_graph and len(self._bindings) < GRAPHS_KEPT else NO_GRAPH
        binding = GpuBinding(self.session, self.manifest.input, self.embedding, shape, graph, self._gpu or 0)
        if graph != NO_GRAPH:
            self._bindings[batch] = binding
        return binding

    def _run_one(self) -> None:
        """A run of the fewest images now: whether cuDNN is installed, and for this CUDA, shows only then."""
        contract = self.manifest.input
        black = np.zeros((contract.batch or 1, *contract.shape(self.preprocessing)), contract.dtype)
        try:
            self.session.run([self.embedding.name], {contract.name: black})
        except Exception as error:  # ORT raises its own exception types
            if not CUDA_FAILURE.search(str(error)):
                raise InvalidFile(f"ONNX Runtime cannot run it ({reason(error)})", path=self._path) from error
            problem, hint = f"ONNX Runtime cannot run it on the GPU ({reason(error)})", cuda_hint(reason(error))
            raise CudaFailure(problem, path=self._path, hint=hint) from error

    def _capture_one(self) -> None:
        """A run of one image now: whether the graph can be captured shows only then."""
        try:
            self(np.zeros((1, self.preprocessing.height, self.preprocessing.width, 3), np.uint8))
        except Exception as error:  # ORT raises its own exception types
            raise UserError(f"ONNX Runtime cannot run it as a CUDA graph ({reason(error)})", path=self._path) from error
