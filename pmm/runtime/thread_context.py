"""What each run of an engine needs: a stream, buffers, execution contexts and CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pmm.runtime import cuda_graph
from pmm.runtime.base import Embeddings
from pmm.runtime.buffers import Buffer, Device
from pmm.runtime.cuda_graph import GRAPHS_KEPT, bucket
from pmm.runtime.driver import DriverError
from pmm.runtime.gpu_array import GpuArray, gpu_array
from pmm.runtime.trt_variant import EngineHandle, layer_times
from pmm.utils.errors import InvalidFile, OutOfMemory, UserError

T = TypeVar("T")


class _Ready(NamedTuple):
    """An execution context set to one batch size in one optimisation profile, and its CUDA graph, if it has one."""

    context: Any
    profile: int
    graph: cuda_graph.Graph | None


class ThreadContext:
    """What one run needs: a stream, buffers for the largest batch, and contexts. Any thread may use it, one at a time.

    A CUDA graph is valid only while the context it was captured from stays as it was. So each kept batch size has its
    own context; they run one after the other, so one block of working memory serves them all. Without captured graphs
    one context changes its shape as needed.
    """

    def __init__(self, engine: EngineHandle, device: Device) -> None:
        self._engine, self._device = engine, device
        # decided once: another one may find that graphs fail while this one makes a context
        self._captures = engine.graphs == "captured"
        self._ready: OrderedDict[int, _Ready] = OrderedDict()
        self._memory: Buffer | None = None
        self._resident: object = None
        most, dim = engine.batch.most, engine.embedding.dim
        try:
            with device.active():
                self._images: Any = device.host_array((most, *engine.image_shape), engine.input.dtype)
                self._embeddings: Any = device.host_array((most, dim), np.float32)
                self._input = device.allocate(self._images.nbytes)
                self._output = device.allocate(self._embeddings.nbytes)
        except UserError as error:
            device.close()
            hint = f"free GPU memory, build it for less than {most} images (--batch), or let fewer runs go at a time"
            raise OutOfMemory(str(error), path=engine.path, hint=hint) from error
        except BaseException:
            device.close()
            raise

    def active(self) -> AbstractContextManager[None]:
        """As `Device.active`."""
        return self._device.active()

    def gpu_images(self, images: Any) -> GpuArray:
        """Images that lie on the GPU, as `pmm.runtime.gpu_array`, for a run here."""
        with self._device.active():
            return gpu_array(images, self._device.stream)

    def new_embeddings(self, count: int) -> GpuArray:
        """Memory for embeddings float32 [count, D] on the GPU, which is the caller's to keep."""
        shape = (count, self._engine.embedding.dim)
        with self._device.active():
            buffer = self._device.allocate_output(max(1, 4 * count * shape[1]))
        return GpuArray(buffer.pointer, shape, np.dtype(np.float32), self._device.index, buffer.owner)

    def run(self, images: npt.NDArray[Any] | GpuArray, embeddings: Embeddings | GpuArray) -> None:
        """images [B, ...] as the graph takes them -> embeddings [B, D], written in place; B at most `most`.

        With CUDA graphs they run as the next larger of a few batch sizes, each of which is captured once.
        """
        count = images.shape[0]
        padded = count if self._engine.graphs == "off" else bucket(count, self._engine.batch.most)
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
        """Run on `images`, which stay on the GPU from one step to the next; returns when the result is complete."""
        with self._device.active():
            self._enqueue(self._uploaded(images))
            self._device.synchronize()

    def enqueue(self, images: npt.NDArray[Any]) -> None:
        """As `step`, but returns at once; `wait` waits."""
        with self._device.active():
            self._enqueue(self._uploaded(images))

    def wait(self) -> None:
        """Until all is done that was enqueued."""
        with self._device.active():
            self._device.synchronize()

    def device_ms(self, images: npt.NDArray[Any]) -> float:
        """Run as `step`; what it took by the GPU's clock, in ms."""
        with self._device.active():
            ready = self._uploaded(images)
            return self._device.elapsed_ms(lambda: self._enqueue(ready))

    def transfers_ms(self, images: npt.NDArray[Any]) -> tuple[float, float]:
        """Copy `images` to the GPU and as many embeddings back, in page-locked memory; by the GPU's clock, in ms."""
        with self._device.active():
            self._uploaded(images)
            batch, embeddings = self._images[: self._runs_as(len(images))], self._embeddings[: len(images)]
            return (
                self._device.elapsed_ms(lambda: self._device.upload(self._input, batch)),
                self._device.elapsed_ms(lambda: self._device.download(self._output, embeddings)),
            )

    def inspect(self, count: int) -> str:
        """The engine inspector's JSON on the layers of a run of `count` images."""
        with self._device.active():
            inspector = self._engine.native.create_engine_inspector()
            # without a context whose shapes are set its answer has no types of tensors
            inspector.execution_context = self._prepared(count).context
            return inspector.get_engine_information(self._engine.trt.LayerInformationFormat.JSON)

    def layer_times(self, images: npt.NDArray[Any], runs: int) -> dict[str, float]:
        """Layer -> median ms of `runs` runs of `images`, without CUDA graph; see `trt_variant.layer_times`."""
        engine, (profile, batch) = self._engine, self._engine.batch.runs_as(len(images))
        with self._device.active():
            self._upload(images, len(images))
            context = engine.checked("create_execution_context", engine.native.create_execution_context)
            self._set_profile(context, profile)
            self._set_batch(context, batch)

            def run() -> None:
                self._execute(context)
                self._device.synchronize()

            def report() -> None:
                engine.checked("report_to_profiler", context.report_to_profiler)

            return layer_times(engine.trt, context, run, report, runs)

    def close(self) -> None:
        """Free graphs, contexts, buffers and stream; from any thread."""
        with self._device.active():
            try:
                self._device.synchronize()
                self._drop_oldest(down_to=0)
            finally:
                self._images = self._embeddings = None
                self._device.close()

    def _uploaded(self, images: npt.NDArray[Any]) -> _Ready:
        """Ready to run on `images`, which are uploaded unless they are the last ones."""
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
        return self._engine.batch.runs_as(count)[1]

    def _enqueue(self, ready: _Ready) -> None:
        if ready.graph is not None:
            ready.graph.launch()
        else:
            self._execute(ready.context)

    def _execute(self, context: Any) -> None:
        self._engine.checked("execute_async_v3", lambda: context.execute_async_v3(self._device.stream))

    def _prepared(self, count: int) -> _Ready:
        profile, batch = self._engine.batch.runs_as(count)
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
        """Close graphs until `down_to` are left; the last one that was dropped, or None."""
        spare = None
        while len(self._ready) > down_to:
            spare = self._ready.popitem(last=False)[1]
            if spare.graph is not None:
                spare.graph.close()
        return spare

    def _new_context(self) -> Any:
        engine, create = self._engine, self._engine.native.create_execution_context
        if self._captures:
            create = partial(create, engine.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        elif engine.context_options is not None:
            create = partial(create, engine.context_options())
        context = engine.checked("create_execution_context", create)
        if self._captures:
            self._lend_memory(context)
        return context

    def _set_profile(self, context: Any, profile: int) -> None:
        stream, call = self._device.stream, "set_optimization_profile_async"
        self._engine.checked(call, lambda: context.set_optimization_profile_async(profile, stream))

    def _lend_memory(self, context: Any) -> None:
        native = self._engine.native
        if self._memory is None:
            # renamed within version 10
            newer = hasattr(native, "device_memory_size_v2")
            size = native.device_memory_size_v2 if newer else native.device_memory_size
            self._memory = self._device.allocate(max(size, 1))
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._memory.pointer, self._memory.nbytes)
        else:
            context.device_memory = self._memory.pointer

    def _set_batch(self, context: Any, batch: int) -> None:
        engine = self._engine
        images, embeddings = engine.input.name, engine.embedding
        shape = (batch, *engine.image_shape)
        engine.checked(f"set_input_shape {list(shape)}", lambda: context.set_input_shape(images, shape))
        if missing := engine.checked("infer_shapes", context.infer_shapes):
            problem = f"{engine.library}: infer_shapes leaves {', '.join(missing)} undetermined"
            raise UserError(problem, path=engine.path)
        output, expected = list(context.get_tensor_shape(embeddings.name)), [batch, embeddings.dim]
        if output != expected:
            raise InvalidFile(f"it returns {output} for {batch} images", path=engine.path, expected=str(expected))
        for name, pointer in ((images, self._input.pointer), (embeddings.name, self._output.pointer)):
            engine.checked(f"set_tensor_address {name}", partial(context.set_tensor_address, name, pointer))

    def _captured(self, context: Any) -> cuda_graph.Graph | None:
        if not self._captures or self._engine.graphs == "off":
            return None
        # the first run after a change of shape updates the context on the way, which must not be captured
        self._execute(context)
        self._device.synchronize()
        try:
            return cuda_graph.capture(self._device.stream, lambda: self._execute(context))
        except DriverError as error:
            self._engine.graphs_failed(str(error))
            return None
