"""Capture work on a stream once and replay it with one launch, through the CUDA driver: no CUDA library is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from pmm.runtime.driver import DriverError, call, libcuda

GRAPHS_KEPT = 16
"""Batch sizes whose graphs a runner keeps: each holds memory on the GPU."""
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate, for example, during a capture


def bucket(count: int, most: int) -> int:
    """The batch that `count` images are padded to: so few sizes are captured that each is kept, whatever comes.

    1, 2, 4, 8, 12, 16, from there to 64 in steps of 8, then of 32; never above `most`.
    """
    step = 8 if 16 < count <= 64 else 32 if count > 64 else 4
    padded = count if count <= 2 else -(-count // step) * step
    return min(padded, most)


class Graph:
    """Captured work, ready to launch."""

    def __init__(self, driver: Any, executable: ctypes.c_void_p, stream: int) -> None:
        self._driver, self._executable, self._stream = driver, executable, stream

    def launch(self) -> None:
        """Enqueue the captured work on the stream it was captured on. Raises DriverError."""
        if not self._executable:
            raise DriverError("this CUDA graph was closed")
        call(self._driver, "cuGraphLaunch", self._executable, ctypes.c_void_p(self._stream))

    def close(self) -> None:
        """Free it; once nothing runs on the stream."""
        executable, self._executable = self._executable, ctypes.c_void_p()
        if executable:
            call(self._driver, "cuGraphExecDestroy", executable)


def capture(stream: int, work: Callable[[], None], driver: Any = None) -> Graph:
    """Record what `work` enqueues on `stream`; nothing of it is run.

    Args:
        stream: handle of a stream that is not the default one; the GPU's context is current in this thread.
        work: enqueues on `stream` only, and neither synchronises nor allocates.
        driver: the CUDA driver's library (default: the one of this machine).

    Raises:
        DriverError: the driver or `work` failed; the stream is usable as before.
    """
    driver = driver or libcuda()
    handle, graph = ctypes.c_void_p(stream), ctypes.c_void_p()
    call(driver, "cuStreamBeginCapture_v2", handle, THREAD_LOCAL)
    try:
        work()
    except BaseException as error:
        # a stream left capturing would refuse everything after; what was recorded is of no interest
        driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        _destroy(driver, graph)
        if isinstance(error, Exception):
            raise DriverError(f"the work to capture failed ({error})") from error
        raise
    try:
        call(driver, "cuStreamEndCapture", handle, ctypes.byref(graph))
        executable = ctypes.c_void_p()
        flags = ctypes.c_ulonglong(0)
        call(driver, "cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, flags)
    finally:
        _destroy(driver, graph)
    return Graph(driver, executable, stream)


def _destroy(driver: Any, graph: ctypes.c_void_p) -> None:
    """The recording; an instantiated graph lives on without it."""
    if graph:
        call(driver, "cuGraphDestroy", graph)
