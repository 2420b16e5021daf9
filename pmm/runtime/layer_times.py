"""What each layer of an engine takes, by the library's own profiler."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

WARM_UP = 3
"""Runs before those that count."""


def layer_times(
    trt: Any, context: Any, run: Callable[[], None], report: Callable[[], None], runs: int
) -> dict[str, float]:
    """Layer -> median ms of `runs` runs, in the order of the library's reports.

    The profiler is called once per layer and run. Runs are plain: of one that was captured as a CUDA graph without a
    profiler nothing is reported (NvInferRuntime.h, IExecutionContext::reportToProfiler).

    Args:
        context: an execution context whose shapes are set.
        run: executes it, and returns when the work is done.
        report: calls `context.report_to_profiler`, or raises.
    """

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            # pybind11 wants the base's own constructor called, not super()'s
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    profiler = Profiler()
    context.profiler = profiler
    context.enqueue_emits_profile = False  # else each run is waited for inside the library
    told: list[dict[str, float]] = []
    for _ in range(WARM_UP + runs):
        profiler.times = {}
        run()
        report()
        told.append(profiler.times)
    return {name: median(times.get(name, 0.0) for times in told[WARM_UP:]) for name in told[-1]}
