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
from pmm.runtime.base import BoundRun, Embeddings, Runner, RunnerInfo, check_on_gpu, in_runs, warn_if_unverified
from pmm.runtime.cuda_graph import GRAPHS_KEPT, bucket
from pmm.runtime.driver import current_gpu
from pmm.runtime.gpu_array import DEFAULT_STREAM, CudaArray, GpuArray, gpu_array, is_on_gpu
from pmm.runtime.gpu_binding import NO_GRAPH, GpuBinding, GpuBoundRun
from pmm.runtime.memory import batch_fits, reason
from pmm.runtime.ort_cuda import CUDA_FAILURE, CudaFailure, fell_back, mend
from pmm.runtime.ort_session import (
    COMPUTED,
    SEARCH,
    check_interface,
    check_request,
    evidence_of,
    onnx_runtime,
    open_session,
    resolved_device,
)
from pmm.utils.errors import UserError
from pmm.utils.hardware import cuda_index, gpu_at

T = TypeVar("T")


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
            BackendUnavailable: ONNX Runtime, the device, or what was asked of it is missing here.
        """
        file = read_onnx(path)
        self._path, self.manifest = path, file.manifest
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        holds, auto = self.manifest.precision_found, device == "auto"
        for_cpus = (self.manifest.quantization or {}).get("target") == "cpu"
        device = "cpu" if auto and for_cpus else resolved_device(device)
        check_request(str(path), device, holds, tf32, cuda_graph)
        # from the bytes that were hashed: the file cannot change in between
        options: dict[str, Any] = {"threads": threads, "tf32": tf32, "cuda_graph": cuda_graph}
        why = ""
        try:
            self.session = open_session(file.content, str(path), device, **options)
            why = fell_back(onnx_runtime(), self.session) if auto and device != "cpu" else ""
            if device != "cpu" and not why and not cuda_graph:
                self._run_one(str(path))
        except CudaFailure as error:
            if not auto:
                raise
            why = str(error)
        if why:
            logging.getLogger("pmm").warning("%s: runs on the CPU: %s", path, why)
            device = "cpu"
            check_request(str(path), device, holds, tf32, cuda_graph)
            self.session = open_session(file.content, str(path), device, **options)
        check_interface(self.session, self.manifest, str(path))
        if warn:
            warn_if_unverified(Path(path), self.manifest)
        self.cuda_graph = cuda_graph
        self._gpu, self._lock = cuda_index(device), threading.Lock()
        kind = "cpu" if self._gpu is None else "cuda"
        self._kept: dict[int, GpuBinding] = {}
        evidence = evidence_of(self.session, device, str(path))
        if cuda_graph:
            self._capture_one(str(path))
        self.info = RunnerInfo(
            backend=f"ort-{kind}",
            device="cpu" if self._gpu is None else gpu_at(self._gpu).name,
            precision="tf32" if tf32 else COMPUTED.get((holds, kind), holds),
            provider=f"onnxruntime {onnx_runtime().__version__} {evidence}"
            f"{'' if self._gpu is None else f', cuDNN {SEARCH}'}{', CUDA graph' if cuda_graph else ''}",
        )

    def __call__(self, images: Crops | CudaArray) -> Embeddings:
        if self._gpu is not None and is_on_gpu(images):
            return self._run_there(images, lambda placed, count: placed.download()[:count])
        self.check(images)  # type: ignore[arg-type]
        return in_runs(self._run, images, self.manifest.input.batch)  # type: ignore[arg-type]

    def embed_on_gpu(self, images: Crops | CudaArray) -> GpuArray:
        if self._gpu is None:
            return super().embed_on_gpu(images)
        return self._run_there(images, lambda placed, count: placed.hand_out(count))

    def _run_there(self, images: Crops | CudaArray, finish: Callable[[GpuBinding, int], T]) -> T:
        """One run in memory of the GPU, and what `finish` takes from it: the place, and the number of images."""
        assert self._gpu is not None
        with current_gpu(self._gpu), self._lock:
            given: npt.NDArray[Any] | GpuArray
            if is_on_gpu(images):
                given = gpu_array(images, DEFAULT_STREAM)
                check_on_gpu(self, given, self._gpu, self.manifest.input)
            else:
                self.check(images)  # type: ignore[arg-type]
                given = self.manifest.input.feed(images, self.preprocessing)  # type: ignore[arg-type]
            count = given.shape[0]
            self.manifest.input.check_batch(count, self._path)
            with batch_fits(count):
                batch = max(1, bucket(count, sys.maxsize) if self.cuda_graph else count)
                placed = self._placed((batch, *given.shape[1:]))
                placed.take(given) if isinstance(given, GpuArray) else placed.upload(given)
                placed.run()
                return finish(placed, count)

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

    def bind(self, images: Crops) -> BoundRun:
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
                return GpuBoundRun(self._placed(feed.shape), feed.copy(), self._lock)
        binding = self.session.io_binding()
        binding.bind_cpu_input(self.manifest.input.name, feed)
        binding.bind_output(self.embedding.name, "cpu")

        def step() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return BoundRun(step)

    def _placed(self, shape: tuple[int, ...]) -> GpuBinding:
        """With CUDA graphs, the one place for images of this shape, up to a number of them: ONNX Runtime lets go of no
        graph. Else a new one."""
        batch = shape[0]
        if batch in self._kept:
            return self._kept[batch]
        graph = batch if self.cuda_graph and len(self._kept) < GRAPHS_KEPT else NO_GRAPH
        placed = GpuBinding(self.session, self.manifest.input, self.embedding, shape, graph, self._gpu or 0)
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
            raise CudaFailure(said + mend(onnx_runtime(), reason(error))) from error

    def _capture_one(self, name: str) -> None:
        """A run of one image now: whether the graph can be captured shows only then."""
        try:
            self(np.zeros((1, self.preprocessing.height, self.preprocessing.width, 3), np.uint8))
        except Exception as error:  # ORT raises its own exception types
            raise UserError(f"{name}: ONNX Runtime cannot run it as a CUDA graph ({reason(error)})") from error
