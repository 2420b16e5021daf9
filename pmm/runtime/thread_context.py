"""What a run of an engine needs for itself: a stream, buffers, execution contexts and CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import BatchProfiles, EmbeddingContract, InputContract
from pmm.runtime import cuda_graph
from pmm.runtime.base import Embeddings
from pmm.runtime.buffers import Buffer, Device
from pmm.runtime.cuda_graph import GRAPHS_KEPT, bucket
from pmm.runtime.driver import DriverError
from pmm.runtime.gpu_array import GpuArray, gpu_array
from pmm.runtime.layer_times import layer_times
from pmm.utils.errors import UserError

T = TypeVar("T")


@dataclass
class EngineHandle:
    """A deserialised engine, shared by all lanes."""

    path: Path
    trt: Any
    library: str
    """Name and version, as tensorrt 11.4.0."""
    logger: Any
    engine: Any
    graphs: Literal["captured", "own", "off"]
    """CUDA graphs: captured by us, by the library itself, or none."""
    context_options: Callable[[], Any] | None
    """For TensorRT-RTX: makes the runtime configuration of one context."""
    batch: BatchProfiles
    image_shape: tuple[int, int, int]
    given: InputContract
    returned: EmbeddingContract
    graphs_failed: Callable[[str], None]
    """Told why, when runs go on without graphs."""

    def checked(self, call: str, make: Callable[[], T]) -> T:
        """What `make` returns. Raises UserError, with the library's errors, for a call that fails: TensorRT returns
        False or None where its binding does not raise."""
        self.logger.errors.clear()
        try:
            done = make()
        except RuntimeError as error:
            raise self._failed(call, self.logger.take(error)) from error
        if done is None or done is False:
            raise self._failed(call, self.logger.take())
        return done

    def _failed(self, call: str, reason: str) -> UserError:
        advice = "; free GPU memory, or build it for fewer images (--batch)" if "memory" in reason.lower() else ""
        return UserError(f"{self.path}: {self.library}: {call} failed ({reason}){advice}")


class _Ready(NamedTuple):
    """An execution context set to one batch size in one optimisation profile, and its CUDA graph if there is one."""

    context: Any
    profile: int
    graph: cuda_graph.Graph | None


class ThreadContext:
    """What one run at a time runs with: stream, buffers for the largest batch, and contexts. Any thread may use it.

    A CUDA graph is valid only while the context it was captured from stays as it was. So each kept batch size has its
    own context; they run one after the other, so one block of working memory serves them all. Without graphs of ours
    one context changes its shape as needed.
    """

    def __init__(self, loaded: EngineHandle, device: Device) -> None:
        self._loaded, self._device = loaded, device
        # decided once: another lane may find that graphs fail while this one makes a context
        self._captures = loaded.graphs == "captured"
        self._ready: OrderedDict[int, _Ready] = OrderedDict()
        self._memory: Buffer | None = None
        self._resident: object = None
        most, dim = loaded.batch.most, loaded.returned.dim
        try:
            with device.active():
                self._images: Any = device.host_array((most, *loaded.image_shape), loaded.given.dtype)
                self._embeddings: Any = device.host_array((most, dim), np.float32)
                self._input = device.allocate(self._images.nbytes)
                self._output = device.allocate(self._embeddings.nbytes)
        except UserError as error:
            device.close()
            advice = f"free GPU memory, build it for less than {most} images (--batch), or let fewer runs go at a time"
            raise UserError(f"{loaded.path}: {error}; {advice}") from error
        except BaseException:
            device.close()
            raise

    def active(self) -> AbstractContextManager[None]:
        """As `Device.active`."""
        return self._device.active()

    def placed(self, images: Any) -> GpuArray:
        """Images that lie on the GPU, as `pmm.runtime.gpu_array`, for a run of this lane."""
        with self._device.active():
            return gpu_array(images, self._device.stream)

    def new_embeddings(self, count: int) -> GpuArray:
        """Memory for embeddings float32 [count, D] on the GPU, which is the caller's to keep."""
        shape = (count, self._loaded.returned.dim)
        with self._device.active():
            buffer = self._device.allocate_output(max(1, 4 * count * shape[1]))
        return GpuArray(buffer.pointer, shape, np.dtype(np.float32), self._device.index, buffer.owner)

    def run(self, images: npt.NDArray[Any] | GpuArray, embeddings: Embeddings | GpuArray) -> None:
        """images [B, ...] as the graph takes them -> embeddings [B, D], written in place; B at most `most`.

        With CUDA graphs they run as the next larger of a few batch sizes, each of which is captured once.
        """
        count = images.shape[0]
        padded = count if self._loaded.graphs == "off" else bucket(count, self._loaded.batch.most)
        with self._device.active():
            self._enqueue(self._upload(images, padded))
            if isinstance(embeddings, GpuArray):
                self._device.copy(embeddings.pointer, self._output.pointer, embeddings.nbytes)
                self._device.synchronize()
            else:
                self._device.download(self._output, self._embeddings[:count])
                self._device.synchronize()
                embeddings[:] = self._embeddings[:count]

    def step(self, images: npt.NDArray[Any]) -> None:
        """Run on `images`, which stay on the GPU from one step to the next; returns when the result is there."""
        with self._device.active():
            self._enqueue(self._there(images))
            self._device.synchronize()

    def enqueue(self, images: npt.NDArray[Any]) -> None:
        """As `step`, but returns at once; `wait` waits."""
        with self._device.active():
            self._enqueue(self._there(images))

    def wait(self) -> None:
        """Until all is done that was enqueued."""
        with self._device.active():
            self._device.synchronize()

    def device_ms(self, images: npt.NDArray[Any]) -> float:
        """Run as `step`; what it took by the GPU's clock, in ms."""
        with self._device.active():
            ready = self._there(images)
            return self._device.elapsed_ms(lambda: self._enqueue(ready))

    def transfers_ms(self, images: npt.NDArray[Any]) -> tuple[float, float]:
        """Copy `images` to the GPU and as many embeddings back, in page-locked memory; by the GPU's clock, in ms."""
        with self._device.active():
            self._there(images)
            given, embeddings = self._images[: self._runs_as(len(images))], self._embeddings[: len(images)]
            return (
                self._device.elapsed_ms(lambda: self._device.upload(self._input, given)),
                self._device.elapsed_ms(lambda: self._device.download(self._output, embeddings)),
            )

    def inspect(self, count: int) -> str:
        """What the engine inspector says of the layers of a run of `count` images, as JSON."""
        with self._device.active():
            inspector = self._loaded.engine.create_engine_inspector()
            # without a context whose shapes are set it tells no tensor's type
            inspector.execution_context = self._prepared(count).context
            return inspector.get_engine_information(self._loaded.trt.LayerInformationFormat.JSON)

    def layer_times(self, images: npt.NDArray[Any], runs: int) -> dict[str, float]:
        """Layer -> median ms of `runs` runs of `images`, without CUDA graph; see `pmm.runtime.layer_times`."""
        loaded, (profile, batch) = self._loaded, self._loaded.batch.runs_as(len(images))
        with self._device.active():
            self._upload(images, len(images))
            context = loaded.checked("create_execution_context", loaded.engine.create_execution_context)
            self._set_profile(context, profile)
            self._set_batch(context, batch)

            def run() -> None:
                self._execute(context)
                self._device.synchronize()

            def report() -> None:
                loaded.checked("report_to_profiler", context.report_to_profiler)

            return layer_times(loaded.trt, context, run, report, runs)

    def close(self) -> None:
        """Free graphs, contexts, buffers and stream; from any thread."""
        with self._device.active():
            try:
                self._device.synchronize()
                self._drop_oldest(down_to=0)
            finally:
                self._images = self._embeddings = None
                self._device.close()

    def _there(self, images: npt.NDArray[Any]) -> _Ready:
        if self._resident is images:
            return self._prepared(len(images))
        ready = self._upload(images, len(images))
        self._resident = images
        return ready

    def _upload(self, images: npt.NDArray[Any] | GpuArray, padded: int) -> _Ready:
        # runs that were enqueued use the graphs, and their upload the page-locked images, until they are done
        self._device.synchronize()
        ready = self._prepared(padded)
        self._resident = None
        if isinstance(images, GpuArray):
            self._device.copy(self._input.pointer, images.pointer, images.nbytes)
        else:
            batch = self._runs_as(padded)
            self._images[: len(images)] = images
            self._images[len(images) : batch] = 0
            self._device.upload(self._input, self._images[:batch])
        return ready

    def _runs_as(self, count: int) -> int:
        return self._loaded.batch.runs_as(count)[1]

    def _enqueue(self, ready: _Ready) -> None:
        if ready.graph is not None:
            ready.graph.launch()
        else:
            self._execute(ready.context)

    def _execute(self, context: Any) -> None:
        self._loaded.checked("execute_async_v3", lambda: context.execute_async_v3(self._device.stream))

    def _prepared(self, count: int) -> _Ready:
        profile, batch = self._loaded.batch.runs_as(count)
        if batch not in self._ready:
            spare = self._drop_oldest(down_to=GRAPHS_KEPT - 1 if self._captures else 0)
            context = self._new_context() if spare is None else spare.context
            if spare is None or spare.profile != profile:
                self._set_profile(context, profile)
            self._set_batch(context, batch)
            self._ready[batch] = _Ready(context, profile, self._captured(context))
        self._ready.move_to_end(batch)
        return self._ready[batch]

    def _drop_oldest(self, down_to: int) -> _Ready | None:
        """Close graphs until `down_to` are left; what has become free, or None."""
        spare = None
        while len(self._ready) > down_to:
            spare = self._ready.popitem(last=False)[1]
            if spare.graph is not None:
                spare.graph.close()
        return spare

    def _new_context(self) -> Any:
        loaded, create = self._loaded, self._loaded.engine.create_execution_context
        if self._captures:
            create = partial(create, loaded.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        elif loaded.context_options is not None:
            create = partial(create, loaded.context_options())
        context = loaded.checked("create_execution_context", create)
        if self._captures:
            self._lend_memory(context)
        return context

    def _set_profile(self, context: Any, profile: int) -> None:
        stream, call = self._device.stream, "set_optimization_profile_async"
        self._loaded.checked(call, lambda: context.set_optimization_profile_async(profile, stream))

    def _lend_memory(self, context: Any) -> None:
        engine = self._loaded.engine
        if self._memory is None:
            # renamed within version 10
            newer = hasattr(engine, "device_memory_size_v2")
            size = engine.device_memory_size_v2 if newer else engine.device_memory_size
            self._memory = self._device.allocate(max(size, 1))
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._memory.pointer, self._memory.nbytes)
        else:
            context.device_memory = self._memory.pointer

    def _set_batch(self, context: Any, batch: int) -> None:
        loaded = self._loaded
        given, returned = loaded.given.name, loaded.returned
        shape = (batch, *loaded.image_shape)
        loaded.checked(f"set_input_shape {list(shape)}", lambda: context.set_input_shape(given, shape))
        if missing := loaded.checked("infer_shapes", context.infer_shapes):
            raise UserError(f"{loaded.path}: {loaded.library}: infer_shapes leaves {', '.join(missing)} undetermined")
        found = list(context.get_tensor_shape(returned.name))
        if found != [batch, returned.dim]:
            raise UserError(f"{loaded.path}: returns {found} for {batch} images; expected {[batch, returned.dim]}")
        for name, pointer in ((given, self._input.pointer), (returned.name, self._output.pointer)):
            loaded.checked(f"set_tensor_address {name}", partial(context.set_tensor_address, name, pointer))

    def _captured(self, context: Any) -> cuda_graph.Graph | None:
        if not self._captures or self._loaded.graphs == "off":
            return None
        # the first run after a change of shape updates the context on the way, which must not be captured
        self._execute(context)
        self._device.synchronize()
        try:
            return cuda_graph.capture(self._device.stream, lambda: self._execute(context))
        except DriverError as error:
            self._loaded.graphs_failed(str(error))
            return None
