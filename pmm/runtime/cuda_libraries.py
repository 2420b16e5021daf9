"""Device memory and a stream, from whichever CUDA library is installed.

The order of choice: torch where it has CUDA (a process that trains or evaluates has it loaded), else pycuda, else
cuda-python. Importing torch costs seconds, also on a machine that could serve with pycuda: to start fast there, leave
torch out of the serving environment. All three use the GPU's primary context, as TensorRT does.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.runtime import driver
from pmm.runtime.buffers import Buffer, Device
from pmm.utils.errors import BackendUnavailable, UserError, reason_of

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for work on the default stream


def open_device(index: int = 0) -> Device:
    """GPU `index` through the first library that works, in the order of the module's docstring.

    Raises BackendUnavailable saying what to install, and why each library does not work.
    """
    reasons = []
    for kind in (TorchDevice, PycudaDevice, CudaPythonDevice):
        try:
            return kind(index)
        except Exception as error:  # each library has its own exception types
            reasons.append(f"{kind.library}: {reason_of(error)}")
    raise BackendUnavailable(
        f"no library that manages memory of a GPU ({'; '.join(reasons)})",
        expected="torch with CUDA, pycuda or cuda-python",
        hint="pip install cuda-python, or pycuda (which needs the CUDA toolkit)",
    )


class TorchDevice(Device):
    """Tensors of torch are the buffers."""

    library = "torch"

    def __init__(self, index: int = 0) -> None:
        self._torch = importlib.import_module("torch")
        if not self._torch.cuda.is_available():
            raise BackendUnavailable("no CUDA device, or a build without CUDA")
        self.index, self.name = index, f"torch {str(self._torch.__version__).split('+')[0]}"
        self._buffers: list[Buffer] = []
        # not torch's Stream: it hands out 32 in turn, and work of another runner would get into a capture
        handle = ctypes.c_void_p()
        with self._torch.cuda.device(index), self._reported("Stream"):
            self._torch.empty(1, device=f"cuda:{index}")  # makes the context this thread's, as the driver wants it
            driver.call(driver.libcuda(), "cuStreamCreate", ctypes.byref(handle), ctypes.c_uint(NON_BLOCKING))
            self.stream = int(handle.value or 0)
            self._stream: Any = self._torch.cuda.ExternalStream(self.stream, device=index)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with self._torch.cuda.device(self.index), self._torch.cuda.stream(self._stream):
            yield

    def allocate(self, nbytes: int) -> Buffer:
        self._buffers.append(self.allocate_output(nbytes))
        return self._buffers[-1]

    def allocate_output(self, nbytes: int) -> Buffer:
        # as the default stream's: memory freed there is used again, that of a closed stream is not
        default = self._torch.cuda.default_stream(self.index)
        with self._reported(f"allocation of {nbytes} bytes"):
            with self._torch.cuda.stream(default):
                memory = self._torch.empty(nbytes, dtype=self._torch.uint8, device=f"cuda:{self.index}")
            self._stream.wait_stream(default)  # which may still use this memory
        return Buffer(int(memory.data_ptr()), nbytes, memory)

    def host_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._reported(f"page-locked allocation of {nbytes} bytes"):
            memory = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True)
        return memory.numpy().view(dtype).reshape(shape)

    def _copy(self, buffer: Buffer, content: npt.NDArray[np.uint8], *, to_device: bool) -> None:
        device, host = buffer.owner[: content.nbytes], self._torch.from_numpy(content)
        with self._reported("copy"):
            if to_device:
                device.copy_(host, non_blocking=True)
            else:
                host.copy_(device, non_blocking=True)

    def synchronize(self) -> None:
        with self._reported("synchronize"):
            self._stream.synchronize()

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        with self._reported("Event"):
            begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(self._stream)
        work()
        with self._reported("Event"):
            end.record(self._stream)
            end.synchronize()
            return float(begin.elapsed_time(end))

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.owner = None
        self._buffers.clear()
        stream, self.stream = self.stream, 0
        if stream:
            with self._torch.cuda.device(self.index), self._reported("Stream"):
                driver.call(driver.libcuda(), "cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def _reported(self, call: str) -> AbstractContextManager[None]:
        return _reported(self.name, call, RuntimeError)


class PycudaDevice(Device):
    """pycuda on the primary context, as its `autoprimaryctx` has it, but active only while it is used.

    `autoprimaryctx` leaves the context on the stack of the thread that imports it first, and pycuda aborts the process
    if a thread ends so; it also lets CUDA_DEVICE choose another GPU than TensorRT's. `autoinit` makes a second context,
    which TensorRT and torch do not share.
    """

    library = "pycuda"

    def __init__(self, index: int = 0) -> None:
        self._cuda = importlib.import_module("pycuda.driver")
        self.index, self.name = index, f"pycuda {importlib.import_module('pycuda').VERSION_TEXT}"
        with self._reported("primary context"):
            self._cuda.init()
            self._context: Any = self._cuda.Device(index).retain_primary_context()
        with self.active(), self._reported("Stream"):
            self._stream: Any = self._cuda.Stream(NON_BLOCKING)
        self.stream = int(self._stream.handle)
        self._buffers: list[Buffer] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with self._reported("context push"):
            self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def allocate(self, nbytes: int) -> Buffer:
        with self._reported(f"allocation of {nbytes} bytes"):
            memory = self._cuda.mem_alloc(nbytes)
        self._buffers.append(Buffer(int(memory), nbytes, memory))
        return self._buffers[-1]

    def allocate_output(self, nbytes: int) -> Buffer:
        with self._reported(f"allocation of {nbytes} bytes"):
            memory = self._cuda.mem_alloc(nbytes)
        return Buffer(int(memory), nbytes, _FreedLast(self, memory.free))

    def host_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        with self._reported(f"page-locked allocation of {list(shape)}"):
            return self._cuda.pagelocked_empty(shape, dtype)

    def _copy(self, buffer: Buffer, content: npt.NDArray[np.uint8], *, to_device: bool) -> None:
        with self._reported("copy"):
            if to_device:
                self._cuda.memcpy_htod_async(buffer.pointer, content, self._stream)
            else:
                self._cuda.memcpy_dtoh_async(content, buffer.pointer, self._stream)

    def synchronize(self) -> None:
        with self._reported("synchronize"):
            self._stream.synchronize()

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        with self._reported("Event"):
            begin, end = self._cuda.Event(), self._cuda.Event()
            begin.record(self._stream)
        work()
        with self._reported("Event"):
            end.record(self._stream)
            end.synchronize()
            return float(end.time_since(begin))

    def close(self) -> None:
        if self._stream is None:
            return
        # pycuda frees only where the context is active
        with self.active(), self._reported("free"):
            for buffer in self._buffers:
                buffer.owner.free()
                buffer.owner = None
            self._buffers.clear()
            self._stream = None

    def _reported(self, call: str) -> AbstractContextManager[None]:
        return _reported(self.name, call, self._cuda.Error)


class CudaPythonDevice(Device):
    """NVIDIA's cuda-python: the CUDA runtime's functions, each of which returns its error code first."""

    library = "cuda-python"

    def __init__(self, index: int = 0) -> None:
        self._cuda = importlib.import_module("cuda.bindings.runtime")
        self.index, self.name = index, f"cuda-python {importlib.import_module('cuda.bindings').__version__}"
        self._buffers: list[Buffer] = []
        self._host: list[int] = []
        with self.active():
            self.stream = int(self._call("cudaStreamCreateWithFlags", NON_BLOCKING))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before = self._call("cudaGetDevice")
        self._call("cudaSetDevice", self.index)
        try:
            yield
        finally:
            if before != self.index:
                self._call("cudaSetDevice", before)

    def allocate(self, nbytes: int) -> Buffer:
        pointer = int(self._call("cudaMalloc", nbytes))
        self._buffers.append(Buffer(pointer, nbytes, None))
        return self._buffers[-1]

    def allocate_output(self, nbytes: int) -> Buffer:
        pointer = int(self._call("cudaMalloc", nbytes))
        return Buffer(pointer, nbytes, _FreedLast(self, lambda: self._call("cudaFree", pointer)))

    def host_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._host.append(int(self._call("cudaMallocHost", nbytes)))
        content = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self._host[-1]))
        return content.view(dtype).reshape(shape)

    def _copy(self, buffer: Buffer, content: npt.NDArray[np.uint8], *, to_device: bool) -> None:
        kinds, host, device = self._cuda.cudaMemcpyKind, content.ctypes.data, buffer.pointer
        if to_device:
            self._call("cudaMemcpyAsync", device, host, content.nbytes, kinds.cudaMemcpyHostToDevice, self.stream)
        else:
            self._call("cudaMemcpyAsync", host, device, content.nbytes, kinds.cudaMemcpyDeviceToHost, self.stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        events: list[Any] = []
        try:
            for _ in range(2):
                events.append(self._call("cudaEventCreate"))
            self._call("cudaEventRecord", events[0], self.stream)
            work()
            self._call("cudaEventRecord", events[1], self.stream)
            self._call("cudaEventSynchronize", events[1])
            return float(self._call("cudaEventElapsedTime", *events))
        finally:
            for event in events:
                self._cuda.cudaEventDestroy(event)  # what it returns would hide what went wrong before

    def close(self) -> None:
        if not self.stream:
            return
        with self.active():
            while self._buffers:
                self._call("cudaFree", self._buffers.pop().pointer)
            while self._host:
                self._call("cudaFreeHost", self._host.pop())
            stream, self.stream = self.stream, 0
            self._call("cudaStreamDestroy", stream)

    def _call(self, name: str, *args: Any) -> Any:
        """The function's result, without its error code. Raises UserError for another code than success."""
        code, *results = getattr(self._cuda, name)(*args)
        if int(code) != 0:
            raise UserError(f"{self.name}: {name} failed ({self._cuda.cudaGetErrorName(code)[1].decode()})")
        return results[0] if results else None


class _FreedLast:
    """Owner of memory: frees it when the last reference to this goes, in any thread."""

    def __init__(self, device: Device, free: Callable[[], Any]) -> None:
        self._device, self._free = device, free

    def __del__(self) -> None:
        with contextlib.suppress(Exception), self._device.active():  # CUDA may be gone before the process is
            self._free()


@contextlib.contextmanager
def _reported(library: str, call: str, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise UserError(f"{library}: {call} failed ({reason_of(error)})") from error
