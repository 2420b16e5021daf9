"""ONNX Runtime on a GPU: images and embeddings of one batch size, at fixed addresses."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.runtime import driver
from pmm.runtime.base import BoundRun, Embeddings
from pmm.runtime.gpu_array import DEFAULT_STREAM, GpuArray

NO_GRAPH = -1
"""ONNX Runtime's graph number for a run that is neither captured nor replayed."""


class GpuBinding:
    """Where a session reads images and leaves embeddings.

    A CUDA graph is replayed on the addresses that it was captured with: `graph`, its number in the session, is for one
    `GpuBinding` only.
    """

    def __init__(
        self,
        session: Any,
        input: InputContract,
        embedding: EmbeddingContract,
        shape: tuple[int, ...],
        graph: int,
        gpu: int = 0,
    ) -> None:
        """For images of `shape` [B, ...], as the graph takes them, on the GPU that the session runs on."""
        import onnxruntime as ort

        self._session, self._gpu = session, gpu
        self._shape, kind = shape, np.dtype(input.dtype).type
        new_value = ort.OrtValue.ortvalue_from_shape_and_type
        self._images = new_value(shape, kind, "cuda", gpu)
        self._embeddings = new_value([shape[0], embedding.dim], np.float32, "cuda", gpu)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(input.name, self._images)
        self._binding.bind_ortvalue_output(embedding.name, self._embeddings)
        self._waiting, self._passing = ort.RunOptions(), ort.RunOptions()
        for options in (self._waiting, self._passing):
            options.add_run_config_entry("gpu_graph_id", str(graph))
        self._passing.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.bound_run: object = None
        """The bound run whose images are on the GPU, if they are one's."""

    def upload(self, images: npt.NDArray[Any]) -> None:
        """Copy `images` to the GPU, and black ones where they are fewer than its batch; returns when they are complete.
        Runs that were enqueued keep theirs."""
        if len(images) < self._shape[0]:
            few, images = images, np.zeros(self._shape, images.dtype)
            images[: len(few)] = few
        self.wait()
        self.bound_run = None
        self._copy(images)

    def copy_from_gpu(self, images: GpuArray) -> None:
        """As `upload`, of images that are on the GPU; where they are fewer than its batch, the other rows stay."""
        self.wait()
        self.bound_run = None
        _copy_on_gpu(self._images.data_ptr(), images.pointer, images.nbytes)

    def copy_embeddings(self, count: int) -> GpuArray:
        """A copy of the first `count` embeddings, on the GPU."""
        import onnxruntime as ort

        shape, gpu = (count, self._embeddings.shape()[1]), self._gpu
        copy = ort.OrtValue.ortvalue_from_shape_and_type([max(1, count), shape[1]], np.float32, "cuda", gpu)
        array = GpuArray(copy.data_ptr(), shape, np.dtype(np.float32), gpu, copy)
        _copy_on_gpu(array.pointer, self._embeddings.data_ptr(), array.nbytes)
        return array

    def run(self) -> None:
        """Returns when the embeddings are complete."""
        self._session.run_with_iobinding(self._binding, self._waiting)

    def enqueue(self) -> None:
        """Start a run; `wait` waits."""
        self._session.run_with_iobinding(self._binding, self._passing)

    def wait(self) -> None:
        """Until all work on the GPU is done."""
        self._binding.synchronize_outputs()

    def download(self) -> Embeddings:
        """A copy of the embeddings [B, D], in host memory."""
        return self._embeddings.numpy()

    def transfers_ms(self, images: npt.NDArray[Any]) -> tuple[float, float]:
        """Host time of copying `images` to the GPU and the embeddings back, in ms."""
        self.wait()
        start = time.perf_counter()
        self._copy(images)
        uploaded = time.perf_counter()
        self.download()
        downloaded = time.perf_counter()
        return (uploaded - start) * 1000, (downloaded - uploaded) * 1000

    def _copy(self, images: npt.NDArray[Any]) -> None:
        self._images.update_inplace(images)
        self._binding.synchronize_inputs()


def _copy_on_gpu(target: int, source: int, nbytes: int) -> None:
    """Returns when it is done; the GPU's context is this thread's."""
    cuda = driver.libcuda()
    driver.call(cuda, "cuMemcpyDtoD_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))
    driver.call(cuda, "cuStreamSynchronize", ctypes.c_void_p(DEFAULT_STREAM))


class GpuBoundRun(BoundRun):
    """A run on images that stay on the GPU; if another call replaces them, the next run uploads them again.

    ONNX Runtime has no events of its stream: the time of a run by the GPU's clock is not known.
    """

    def __init__(self, binding: GpuBinding, images: npt.NDArray[Any], lock: threading.Lock) -> None:
        super().__init__(binding.run)
        self._binding, self._images, self._lock = binding, images, lock

    def _run(self) -> None:
        with self._lock:
            self._uploaded().run()

    def _enqueue(self) -> None:
        with self._lock:
            self._uploaded().enqueue()

    def _wait(self) -> None:
        self._binding.wait()

    def _transfers_ms(self) -> tuple[float, float]:
        with self._lock:
            return self._uploaded().transfers_ms(self._images)

    def _uploaded(self) -> GpuBinding:
        if self._binding.bound_run is not self:
            self._binding.upload(self._images)
            self._binding.bound_run = self
        return self._binding
