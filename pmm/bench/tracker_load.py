"""The load of a tracker: each call has as many crops as its video frame has people."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from pmm.bench.latency import Clock
from pmm.bench.statistics import percentile
from pmm.data.preprocessing import Crops
from pmm.runtime.base import Runner

TRACKER_SIZES = (1, 40)
"""The fewest and the most crops of a call."""
CALLS = 200
ENOUGH_FOR_P99 = 100


def measure_tracker_load(
    runner: Runner, crops: Crops, seconds: float, clock: Clock = time.perf_counter
) -> dict[str, int | float | None]:
    """Time calls of 1 to 40 of `crops`, in random order from a fixed seed, then the same calls in order of their size.

    Each size is run once beforehand, in at most `seconds`. The random calls take at most `seconds` as well: a slow
    runner gets fewer of them, and the same ones in order. Returns the fields of `pmm.bench.result_schema.Tracker`.
    """
    least, most = TRACKER_SIZES
    _timed(runner, crops, range(most, least - 1, -1), seconds, clock)
    draw = random.Random(0)
    sizes = [draw.randint(least, most) for _ in range(CALLS)]
    drawn = _timed(runner, crops, sizes, seconds, clock)
    sizes = sorted(sizes[: len(drawn)])
    in_order = _timed(runner, crops, sizes, float("inf"), clock)
    return {
        "least": least,
        "most": most,
        "calls": len(drawn),
        "mean_ms": 1000 * sum(drawn) / len(drawn),
        "p99_ms": 1000 * percentile(drawn, 99) if len(drawn) >= ENOUGH_FOR_P99 else None,
        "images_per_s": sum(sizes) / sum(drawn),
        "in_order_images_per_s": sum(sizes) / sum(in_order),
    }


def _timed(runner: Runner, crops: Crops, sizes: Sequence[int], seconds: float, clock: Clock) -> list[float]:
    """Seconds of each call, at least one; no more calls after `seconds`."""
    taken: list[float] = []
    begin = clock()
    for size in sizes:
        start = clock()
        runner(crops[:size])
        now = clock()
        taken.append(now - start)
        if now - begin >= seconds:
            break
    return taken
