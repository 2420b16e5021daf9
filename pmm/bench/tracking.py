"""The load of a tracker: as many crops as there are people in the frame, which is another number in each frame."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from pmm.bench.latency import Clock
from pmm.bench.statistics import percentile
from pmm.data.preprocessing import Crops
from pmm.runtime.base import Runner

SIZES = (1, 40)
"""The least and the most crops of a call."""
CALLS = 200
ENOUGH_FOR_P99 = 100


def track(
    runner: Runner, crops: Crops, seconds: float, clock: Clock = time.perf_counter
) -> dict[str, int | float | None]:
    """Calls of 1 to 40 of `crops`, drawn evenly, always the same; then the same calls in order of their size.

    The fields of `pmm.bench.schema.Tracker`. Each size is run once beforehand. At most `seconds` for that, as long for
    the calls, and as long as those took for the second time: a slow runner gets fewer calls, the same both times.
    """
    least, most = SIZES
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
    """Seconds of each call, one at least; no more calls after `seconds`."""
    found: list[float] = []
    begin = clock()
    for size in sizes:
        start = clock()
        runner(crops[:size])
        now = clock()
        found.append(now - start)
        if now - begin >= seconds:
            break
    return found
