"""The interface to a CUDA library: device memory, a stream, copies. The libraries are in `cuda_libraries`."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pmm.runtime import driver


@dataclass
class Buffer:
    """Device memory."""

    pointer: int
    nbytes: int
    owner: Any
    """Keeps the memory alive, or frees it."""


class Device(ABC):
    """A GPU, a new stream on it, and the buffers that were allocated for it; for one thread at a time.

    Everything but `active` and `close` is called inside `with device.active()`. Copies are asynchronous on `stream`:
    the arrays must stay as they are until `synchronize` returns. Every method raises UserError if CUDA refuses.
    """

    library: ClassVar[str]
    name: str
    """Library and version, as pycuda 2026.1."""
    index: int
    """Of the GPU, among those that CUDA_VISIBLE_DEVICES leaves visible."""
    stream: int
    """The stream's handle (CUstream), which no other `Device` has."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Make the GPU's context the calling thread's; any thread may do so, also several levels deep."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Buffer:
        """`nbytes` of device memory, aligned to 256 bytes or more; its content is undefined."""

    @abstractmethod
    def allocate_output(self, nbytes: int) -> Buffer:
        """As `allocate`, but the memory lives until its `owner` is gone, also after `close`."""

    @abstractmethod
    def host_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A page-locked array, which copies reach without an intermediate one; not to be used after `close`."""

    def upload(self, buffer: Buffer, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the start of `buffer`."""
        self._copy(buffer, _bytes_of(buffer, array), to_device=True)

    def download(self, buffer: Buffer, array: npt.NDArray[Any]) -> None:
        """Copy the start of `buffer` into a contiguous array."""
        self._copy(buffer, _bytes_of(buffer, array), to_device=False)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy on the GPU, from pointer to pointer."""
        pointers = ctypes.c_uint64(target), ctypes.c_uint64(source)
        size, stream = ctypes.c_size_t(nbytes), ctypes.c_void_p(self.stream)
        driver.call(driver.libcuda(), "cuMemcpyDtoDAsync_v2", *pointers, size, stream)

    @abstractmethod
    def _copy(self, buffer: Buffer, content: npt.NDArray[np.uint8], *, to_device: bool) -> None: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""

    @abstractmethod
    def elapsed_ms(self, work: Callable[[], None]) -> float:
        """Time of `work`, which enqueues on the stream, by the GPU's clock, in ms; waits for it."""

    @abstractmethod
    def close(self) -> None:
        """Free the buffers and the stream; any thread may do so, once nothing runs on the stream."""


def _bytes_of(buffer: Buffer, array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A view of `array`; a copy past the end of device memory would go unnoticed."""
    if not array.flags.c_contiguous or array.nbytes > buffer.nbytes:
        raise ValueError(f"{array.nbytes} bytes (contiguous: {array.flags.c_contiguous}) for {buffer.nbytes} bytes")
    return array.reshape(-1).view(np.uint8)
