"""How this process and its threads share the cores with others: what is settled before torch is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import MutableMapping

from pmm.utils.hardware import compute_threads, physical_cores

SPINS = "20000"
"""Looks for the next piece of work before a thread of OpenMP sleeps. libgomp's own number, 300,000, is milliseconds, in
which the processes beside us do not get the core. How long a look takes, and a thread to wake, depends on the
processor: 1,000 cost nothing on one, and made a quiet step half as slow again on another, where 20,000 cost 4 % and
saved 39 % beside others."""
SLICE_NS = 100_000
"""Time that the scheduler gives a thread in one go: the least that Linux takes (sched(7), sched_setattr(2))."""


def settle_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in the environment how the threads of torch shall wait and, below a quota, how many there shall be; what the
    user has said there stays. For this process and those that it starts, before torch is loaded: OpenMP reads it then.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPINS
    if compute_threads() < physical_cores():
        environment.setdefault("OMP_NUM_THREADS", str(compute_threads()))


def take_short_turns() -> bool:
    """Let this thread, and what it starts, run in short turns, which come soon, rather than in long ones, which are
    waited for: at each barrier a thread that has no core holds up all the others. Its share of the time stays the same.

    Linux from 6.12 does so; older kernels ignore it. False where the system does not know it or forbids it, and for a
    process whose owner has chosen another policy than the usual one.
    """
    number = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    asked = _Attributes(size=ctypes.sizeof(_Attributes), policy=os.SCHED_OTHER, nice=nice, runtime=SLICE_NS)
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).syscall(number, 0, ctypes.byref(asked), 0) == 0
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
