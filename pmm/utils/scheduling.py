"""How the threads of this process share the cores with other processes. Configured before torch is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import MutableMapping

from pmm.utils.hardware import compute_threads, physical_cores

SPINS = "20000"
"""Times that an OpenMP thread polls for work before it sleeps. libgomp's default, 300,000, takes milliseconds, in which
other processes do not get the core. The time of a poll and of a wake-up depends on the processor: 1,000 cost nothing on
one, and a step half as much time again on another, where 20,000 cost 4 % and, beside other processes, saved 39 %."""
SLICE_NS = 100_000
"""Time slice of a thread: the shortest that Linux accepts (sched(7), sched_setattr(2))."""


def configure_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set variables for how the threads of torch wait and, below a CPU quota, for their number; those of the user stay.
    They apply to this process and its children if they are set before torch is loaded: OpenMP reads them then.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPINS
    if compute_threads() < physical_cores():
        environment.setdefault("OMP_NUM_THREADS", str(compute_threads()))


def use_short_time_slices() -> bool:
    """Give this thread, and its children, short time slices, which come soon, instead of long ones: at each barrier, a
    thread without a core delays all the others. The share of the CPU time stays the same.

    Linux from 6.12 does so; older kernels ignore it. False if the system does not support or allow it, and for a
    process that has another scheduling policy than the usual one.
    """
    number = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _Attributes(size=ctypes.sizeof(_Attributes), policy=os.SCHED_OTHER, nice=nice, runtime=SLICE_NS)
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).syscall(number, 0, ctypes.byref(attributes), 0) == 0
    return False


class _Attributes(ctypes.Structure):
    """struct sched_attr, in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )
