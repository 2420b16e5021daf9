"""Forks: a child process inherits the memory of the computing libraries, but none of their threads. Loads no torch."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from pmm.utils.errors import UserError
from pmm.utils.hardware import nvidia_gpus

_THREADED = ("onnxruntime", "openvino")
"""Libraries whose destructors wait for their threads: ONNX Runtime has one as soon as it is imported."""
_OMP_PAUSE_HARD = 2


def around_forks(*, before: Callable[[], object] = lambda: None, in_child: Callable[[], object] = lambda: None) -> None:
    """Call `before` whenever this process is about to be forked, and `in_child` in the child, first of all."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_child=in_child)


def never_free(item: object) -> None:
    """Keep `item` and all that it holds alive, even at the end of the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


def _end_openmp_threads() -> None:
    """OpenMP starts its threads again when torch has work; a child would look for those of its parent, and wait for
    ever."""
    if (pause := _c("omp_pause_resource_all")) is not None:
        pause(_OMP_PAUSE_HARD)


def check_cuda_after_fork() -> None:
    """Call before a GPU is used. Raises UserError on a machine with GPUs if a process that this one was forked from had
    looked for them: CUDA does not work in its children."""
    if nvidia_gpus() and _parent_used_gpus:
        raise UserError(
            "CUDA does not work in a process that was forked from one that has used it",
            hint="open runners on a GPU after the fork alone, start processes by spawn, or use --device cpu",
        )


_parent_used_gpus = False


def _note_gpus() -> None:
    global _parent_used_gpus
    _parent_used_gpus = nvidia_gpus.cache_info().currsize > 0


def _end_without_destructors() -> None:
    """After Python itself, let the process end at once, with its exit code and with what C has still to write: no
    destructor then waits for threads that stayed in the parent."""
    on_exit = _c("on_exit")  # glibc's; what is registered last is called first
    if on_exit is not None and any(name in sys.modules for name in _THREADED):
        for name in ("_exit", "fcloseall"):
            on_exit(ctypes.cast(_c(name), ctypes.c_void_p), None)


def _c(name: str) -> Any:
    """The C function of that name, None if this process has none."""
    return getattr(ctypes.CDLL(None), name, None)


around_forks(before=_end_openmp_threads, in_child=_end_without_destructors)
around_forks(in_child=_note_gpus)
