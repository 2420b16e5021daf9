"""What runners that execute with torch share: devices, TF32, threads, CUDA graphs, and steps timed on the GPU."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.runtime.base import BoundRun, Embeddings, Runner, check_on_gpu
from pmm.runtime.cuda_graph import GRAPHS_KEPT, bucket
from pmm.runtime.gpu_array import DEFAULT_STREAM, CudaArray, GpuArray, gpu_array, is_on_gpu
from pmm.utils.errors import BackendUnavailable, InvalidInput
from pmm.utils.hardware import gpu_at, quota_cores

WARM_UPS = 3
"""Runs before a capture: libraries choose their kernels and reserve their memory, neither of which can be captured."""
_TF32 = threading.RLock()


class TorchRunner(Runner):
    """Images are copied to the device, `_run` computes their embeddings, which are copied back. Subclasses set `info`.

    On a GPU, images may be arrays on it: torch's CUDA tensors, or any with DLPack or the CUDA array interface.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        embedding: EmbeddingContract,
        device: torch.device,
        threads: int = 0,
        *,
        tf32: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """Raises BackendUnavailable for TF32 or CUDA graphs on a device without them."""
        check_modes(device, tf32=tf32, cuda_graph=cuda_graph)
        self.preprocessing, self.embedding, self.device = preprocessing, embedding, device
        self.accepts_gpu_arrays = device.type == "cuda"
        self._tf32, self._cuda_graph = tf32, cuda_graph
        self._captured: dict[int, CapturedRun] = {}
        self._lock = threading.Lock()
        self._restore_threads = set_threads(threads)

    @abstractmethod
    def _run(self, images: Tensor) -> Tensor:
        """uint8 images [B, H, W, 3] on the device -> embeddings [B, D] there."""

    def _release(self) -> None:
        self._captured.clear()
        self._restore_threads()

    def _embed(self, images: Crops | CudaArray) -> Embeddings:
        return self._run_on(images, lambda embeddings: embeddings.float().cpu()).numpy()

    def _embed_on_gpu(self, images: Crops | CudaArray) -> GpuArray:
        def complete(embeddings: Tensor) -> Tensor:
            embeddings = embeddings.float().contiguous()
            torch.cuda.current_stream(self.device).synchronize()
            return embeddings

        embeddings = self._run_on(images, complete)
        shape = tuple(embeddings.shape)
        return GpuArray(embeddings.data_ptr(), shape, np.dtype(np.float32), self._index(), embeddings)

    def _run_on(self, images: Crops | CudaArray, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """What `finish` makes of the embeddings [B, D] on the device."""
        tensor = self._from_gpu(images) if is_on_gpu(images) else self._to_device(images)  # type: ignore[arg-type]
        if not len(tensor):
            return torch.empty(0, self.embedding.dim, device="cpu")
        return finish(self._replay(tensor) if self._cuda_graph else self._forward(tensor))

    def _from_gpu(self, images: CudaArray) -> Tensor:
        """The images [B, H, W, 3] on this GPU, sharing their memory. Raises InvalidInput for others."""
        if isinstance(images, Tensor):
            tensor, index = images, images.device.index
        else:
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream(self.device).cuda_stream or DEFAULT_STREAM
                array = gpu_array(images, stream)
                tensor, index = _shared(array), array.device
        if tensor.dtype != torch.uint8:
            raise InvalidInput(f"the images on the GPU are {tensor.dtype}", expected="uint8 [B, H, W, 3]")
        array = GpuArray(tensor.data_ptr(), tuple(tensor.shape), np.dtype(np.uint8), index, tensor)
        check_on_gpu(self, array, self._index())
        return tensor

    def _index(self) -> int:
        """Of the GPU."""
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _bind(self, images: Crops) -> BoundRun:
        tensor = self._to_device(images.copy())

        def step() -> None:
            self._forward(tensor)

        if self.device.type != "cuda":
            return BoundRun(step)
        launch = CapturedRun(self._forward, tensor).replay if self._cuda_graph else partial(self._forward, tensor)
        return CudaBoundRun(launch, tensor)

    def device_name(self) -> str:
        """cpu or the GPU's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def blank(self, count: int) -> Crops:
        """`count` black crops."""
        return np.zeros((count, self.preprocessing.height, self.preprocessing.width, 3), np.uint8)

    def _to_device(self, images: Crops) -> Tensor:
        # torch shares no memory that is read-only or runs backwards
        return torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self.device)

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        with tf32_allowed(self._tf32) if _obeys_tf32_setting(self.device) else contextlib.nullcontext():
            return self._run(images)

    def _replay(self, images: Tensor) -> Tensor:
        # the buffers of a captured run are one for all threads; what leaves is a copy
        count = len(images)
        batch = bucket(count, sys.maxsize)
        with self._lock:
            captured = self._captured.pop(batch, None)
            if captured is None:
                captured = CapturedRun(self._forward, images.new_zeros(batch, *images.shape[1:]))
            self._captured[batch] = captured  # now the last to be dropped
            while len(self._captured) > GRAPHS_KEPT:
                del self._captured[next(iter(self._captured))]
            captured.images[:count].copy_(images)  # the other rows are images of runs before, or black
            return captured.replay()[:count].clone()


def _shared(array: GpuArray) -> Tensor:
    """The same memory as a tensor."""
    return torch.as_tensor(array)


class CapturedRun:
    """A run on one batch as a CUDA graph: `images` is where it reads, and each replay writes the same embeddings."""

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self.images = images
        side, current = torch.cuda.Stream(images.device), torch.cuda.current_stream(images.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run(images)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # torch's default would be a stream of the first GPU that it captured on
        with torch.cuda.device(images.device), torch.cuda.graph(self._graph, stream=side):
            self._embeddings = run(images)

    def replay(self) -> Tensor:
        """Launch it, without waiting; the embeddings [B, D] are overwritten by the next replay."""
        self._graph.replay()
        return self._embeddings


class CudaBoundRun(BoundRun):
    """A run on a GPU, on the current stream of the thread that uses it."""

    def __init__(self, launch: Callable[[], Tensor], images: Tensor) -> None:
        """`launch` starts a run on `images`, which are on the GPU, and returns the tensor that its embeddings go to."""
        self._launch, self._images, self._embeddings = launch, images, launch()
        # page-locked, as in a service where latency matters: other memory is copied twice
        self._host_images = images.cpu().pin_memory()
        self._host_embeddings = torch.empty_like(self._embeddings, device="cpu").pin_memory()

    def _run(self) -> None:
        self._launch()
        self._wait()

    def _enqueue(self) -> None:
        self._launch()

    def _wait(self) -> None:
        torch.cuda.synchronize(self._images.device)

    def _device_ms(self) -> float:
        return self._timed(self._launch)

    def _transfers_ms(self) -> tuple[float, float]:
        upload = self._timed(lambda: self._images.copy_(self._host_images, non_blocking=True))
        return upload, self._timed(lambda: self._host_embeddings.copy_(self._embeddings, non_blocking=True))

    def _timed(self, work: Callable[[], object]) -> float:
        """ms by the GPU's clock from an idle GPU to the end of `work`."""
        self._wait()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._images.device)  # by itself, an event takes the first GPU's
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end)


def set_threads(count: int) -> Callable[[], None]:
    """Let torch have `count` CPU threads, in the whole process; 0: as many as it has, or fewer where a quota of CPU
    time is less and OMP_NUM_THREADS is not set. Call the result to restore the number."""
    before = torch.get_num_threads()
    quota = None if "OMP_NUM_THREADS" in os.environ else quota_cores()
    torch.set_num_threads(count or min(before, quota or before))
    return partial(torch.set_num_threads, before)


def check_modes(device: torch.device, *, tf32: bool = False, cuda_graph: bool = False) -> None:
    """Raises BackendUnavailable for TF32 or CUDA graphs on a device without them."""
    if device.type == "cpu" and (tf32 or cuda_graph):
        raise BackendUnavailable(f"a CPU has no {'TF32' if tf32 else 'CUDA graphs'}", hint="use a GPU")
    if tf32 and not (gpu := gpu_at(device.index or 0)).has_tf32:
        raise BackendUnavailable(f"{gpu.name} has no TF32", hint="run it in fp32")


def _obeys_tf32_setting(device: torch.device) -> bool:
    return device.type == "cuda"


@contextlib.contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Matrix products and convolutions of fp32 tensors in TF32 or not, whatever the process has set; one thread at a
    time, as the setting is the process's."""
    with _TF32:
        matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
