"""ONNX Runtime on a GPU: images and embeddings of one batch size that stay there, at addresses that stay."""

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
        given: InputContract,
        returned: EmbeddingContract,
        shape: tuple[int, ...],
        graph: int,
        gpu: int = 0,
    ) -> None:
        """For images of `shape` [B, ...], as the graph takes them, on the GPU that the session runs on."""
        import onnxruntime as ort

        self._session, self._gpu = session, gpu
        self._shape, kind = shape, np.dtype(given.dtype).type
        place = ort.OrtValue.ortvalue_from_shape_and_type
        self._images = place(shape, kind, "cuda", gpu)
        self._embeddings = place([shape[0], returned.dim], np.float32, "cuda", gpu)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(given.name, self._images)
        self._binding.bind_ortvalue_output(returned.name, self._embeddings)
        self._waiting, self._passing = ort.RunOptions(), ort.RunOptions()
        for options in (self._waiting, self._passing):
            options.add_run_config_entry("gpu_graph_id", str(graph))
        self._passing.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.holds: object = None
        """Whose images are there; None: of nobody who will ask."""

    def upload(self, images: npt.NDArray[Any]) -> None:
        """Copy `images` to the GPU, and black ones where there are fewer than its batch; returns when they are there.
        Runs that were enqueued keep theirs."""
        if len(images) < self._shape[0]:
            few, images = images, np.zeros(self._shape, images.dtype)
            images[: len(few)] = few
        self.wait()
        self.holds = None
        self._copy(images)

    def take(self, images: GpuArray) -> None:
        """As `upload`, of images that are on the GPU; where there are fewer than its batch, the others stay."""
        self.wait()
        self.holds = None
        _copy_on_gpu(self._images.data_ptr(), images.pointer, images.nbytes)

    def hand_out(self, count: int) -> GpuArray:
        """A copy of the first `count` embeddings, on the GPU."""
        import onnxruntime as ort

        shape, gpu = (count, self._embeddings.shape()[1]), self._gpu
        kept = ort.OrtValue.ortvalue_from_shape_and_type([max(1, count), shape[1]], np.float32, "cuda", gpu)
        found = GpuArray(kept.data_ptr(), shape, np.dtype(np.float32), gpu, kept)
        _copy_on_gpu(found.pointer, self._embeddings.data_ptr(), found.nbytes)
        return found

    def run(self) -> None:
        """Returns when the embeddings are complete."""
        self._session.run_with_iobinding(self._binding, self._waiting)

    def enqueue(self) -> None:
        """Start a run; `wait` waits."""
        self._session.run_with_iobinding(self._binding, self._passing)

    def wait(self) -> None:
        """Until all is done that the GPU was given."""
        self._binding.synchronize_outputs()

    def download(self) -> Embeddings:
        """A copy of the embeddings [B, D], in host memory."""
        return self._embeddings.numpy()

    def transfers_ms(self, images: npt.NDArray[Any]) -> tuple[float, float]:
        """Host time of copying `images` to the GPU and the embeddings back, in ms."""
        self.wait()
        start = time.perf_counter()
        self._copy(images)
        there = time.perf_counter()
        self.download()
        back = time.perf_counter()
        return (there - start) * 1000, (back - there) * 1000

    def _copy(self, images: npt.NDArray[Any]) -> None:
        self._images.update_inplace(images)
        self._binding.synchronize_inputs()


def _copy_on_gpu(target: int, source: int, nbytes: int) -> None:
    """Returns when it is done; the GPU's context is this thread's."""
    cuda = driver.libcuda()
    driver.call(cuda, "cuMemcpyDtoD_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))
    driver.call(cuda, "cuStreamSynchronize", ctypes.c_void_p(DEFAULT_STREAM))


class GpuBoundRun(BoundRun):
    """A run on images that stay on the GPU; if another call puts its own there, the next run brings them back.

    ONNX Runtime lends no events of its stream: what a run takes by the GPU's own clock is not known.
    """

    def __init__(self, placed: GpuBinding, images: npt.NDArray[Any], lock: threading.Lock) -> None:
        super().__init__(placed.run)
        self._placed, self._images, self._lock = placed, images, lock

    def __call__(self) -> None:
        with self._lock:
            self._there().run()

    def enqueue(self) -> None:
        with self._lock:
            self._there().enqueue()

    def wait(self) -> None:
        self._placed.wait()

    def transfers_ms(self) -> tuple[float, float]:
        with self._lock:
            return self._there().transfers_ms(self._images)

    def _there(self) -> GpuBinding:
        if self._placed.holds is not self:
            self._placed.upload(self._images)
            self._placed.holds = self
        return self._placed
