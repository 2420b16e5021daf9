"""Arrays on an NVIDIA GPU: torch's, CuPy's, JAX's, Numba's or PyCUDA's, read without loading any of these.

Two protocols give the address of the data, and when it is complete: DLPack (its producer makes our stream wait) and the
CUDA array interface (it names the stream to wait for).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np

from pmm.runtime import driver
from pmm.utils.errors import InvalidInput

DEFAULT_STREAM = 1
"""Handle of the stream that most work is enqueued on that names no other (CU_STREAM_LEGACY)."""


class CudaArray(Protocol):
    """An array on a GPU that has one of the two protocols."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class GpuArray:
    """A contiguous array on an NVIDIA GPU. `torch.as_tensor(array)` and `cupy.asarray(array)` share its memory."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int
    """Index of the GPU, among the visible ones."""
    owner: Any = field(repr=False, compare=False)
    """Keeps the memory alive."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; stream None: the content is complete."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def rows(self, start: int, stop: int) -> GpuArray:
        """A view of rows `start` to `stop`."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        count = max(0, min(stop, self.shape[0]) - start)
        return GpuArray(self.pointer + start * row, (count, *self.shape[1:]), self.dtype, self.device, self.owner)


def is_on_gpu(array: object) -> bool:
    """Whether `array` is on an NVIDIA GPU, by its protocol."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in _CUDA
    return hasattr(array, "__cuda_array_interface__")


def gpu_array(array: Any, stream: int) -> GpuArray:
    """`array`, which `is_on_gpu`, as a GpuArray of the same memory. The work of its producer comes before all that is
    enqueued on `stream` from now on; the GPU's context is current in this thread.

    Raises InvalidInput for one that is not contiguous, or of a type that numpy does not have.
    """
    if isinstance(array, GpuArray):
        return array
    return _from_dlpack(array, stream) if hasattr(array, "__dlpack__") else _from_interface(array)


_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}  # DLDataTypeCode -> numpy's letter


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h, which is the first member of DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _from_dlpack(array: Any, stream: int) -> GpuArray:
    # an unconsumed capsule frees its tensor when it is dropped, so it can be the owner
    capsule = array.__dlpack__(stream=stream)
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = ctypes.cast(pointer_of(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    shape = tuple(tensor.shape[: tensor.ndim])
    letter = _KINDS.get(tensor.code)
    if letter is None or tensor.lanes != 1 or tensor.bits % 8:
        problem = f"the array on the GPU has {tensor.bits} bits of a type that numpy does not have"
        raise InvalidInput(problem, expected="uint8")
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    _check_contiguous(shape, strides)
    pointer = (tensor.data or 0) + tensor.byte_offset
    return GpuArray(pointer, shape, np.dtype(f"{letter}{tensor.bits // 8}"), int(array.__dlpack_device__()[1]), capsule)


def _from_interface(array: Any) -> GpuArray:
    interface = array.__cuda_array_interface__
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    _check_contiguous(shape, strides and tuple(stride // dtype.itemsize for stride in strides))
    pointer, index, cuda = int(interface["data"][0]), ctypes.c_int(), driver.libcuda()
    if pointer:  # 0 for an array of no elements
        driver.call(cuda, "cuPointerGetAttribute", ctypes.byref(index), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
    # before version 3 without a stream: the default one is waited for. From then on, None is for complete arrays.
    stream = interface.get("stream") if interface["version"] >= 3 else DEFAULT_STREAM
    if stream is not None:
        driver.call(cuda, "cuStreamSynchronize", ctypes.c_void_p(stream))
    return GpuArray(pointer, shape, dtype, index.value, array)


_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


def _check_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
    """Raises InvalidInput unless `strides`, in elements, are those of a contiguous array."""
    dense = 0 if 0 in shape else 1
    for size, stride in reversed(list(zip(shape, strides or (), strict=bool(strides)))):
        if dense and size > 1 and stride != dense:
            raise InvalidInput(
                f"the array on the GPU, {list(shape)} with strides {list(strides or ())}, is not contiguous",
                hint="copy it first, as with .contiguous() in torch",
            )
        dense *= size
