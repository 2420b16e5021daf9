"""A core of its own for each thread of torch, while it computes. Loads torch only where that is possible."""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType

from pmm.training.flags import TrainOptions
from pmm.utils.hardware import compute_threads, nvidia_gpus

BINDINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""What binds the threads of OpenMP."""


class OwnCores:
    """A context for a step of training on a CPU. In it, this thread keeps to its core, as torch's others always do.

    Beside other processes, two threads that wait for each other at every barrier may share one core for long, and the
    step then takes several times as long. Only this thread, and only in a step: what it starts inherits its cores.
    """

    def __init__(self, options: TrainOptions) -> None:
        """Loads torch, if it is not loaded yet, and each thread can have a core: a process on all of its cores, which
        is not to use a GPU, and whose user has not bound its threads."""
        self._all: set[int] = set()
        self._own: set[int] = set()
        if sys.platform == "linux" and "torch" not in sys.modules and _one_each(options):
            self._all = os.sched_getaffinity(0)
            os.environ["OMP_PROC_BIND"] = "true"
            import torch  # noqa: F401 - OpenMP reads it now, and binds this thread

            del os.environ["OMP_PROC_BIND"]  # for child processes
            self._own = os.sched_getaffinity(0)
            self._keep_to(self._all)

    def __enter__(self) -> None:
        self._keep_to(self._own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._keep_to(self._all)

    def _keep_to(self, cores: set[int]) -> None:
        if self._own != self._all:
            with contextlib.suppress(OSError):  # as of a core that was taken from this process meanwhile
                os.sched_setaffinity(0, cores)


def _one_each(options: TrainOptions) -> bool:
    """Whether there are as many threads as cores, and all are for this process. With fewer, two such processes would
    take the same cores and leave others idle."""
    on_cpu = options.device == "cpu" or (options.device == "auto" and not nvidia_gpus())
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    bound = any(name in os.environ for name in BINDINGS)
    threads = options.threads or os.environ.get("OMP_NUM_THREADS") or compute_threads()
    cores = len(os.sched_getaffinity(0))
    return on_cpu and alone and not bound and cores > 1 and str(threads) == str(cores)
