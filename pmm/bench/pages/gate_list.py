"""The gates of a run as people read them: what each asks, and who does not keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmm.bench.pages.format import number, one_line, percent
from pmm.bench.pages.queries import batch_sizes, ran, reference_of
from pmm.bench.schema import BenchReport, Gates

ASKED = "every backend that is asked for by name runs, and none goes wrong"


Status = Literal["failed", "passed", "not judged", "off"]
STATUSES: tuple[Status, ...] = ("failed", "passed", "not judged", "off")


@dataclass(frozen=True, kw_only=True)
class GateLine:
    """One bound: what it asks, and who does not keep it."""

    flag: str
    asks: str
    status: Status
    """not judged: there was no result to hold against it."""
    failures: tuple[str, ...] = ()
    """One line each: result and what was found."""


def gates(report: BenchReport) -> list[GateLine]:
    """Every gate, the failed ones first, those that are off last."""
    bounds = _bounds(report.gates, batch_sizes(report))
    # of who was asked for, the report knows only those that were missed; a gate of a name unknown here must not vanish
    bounds |= {f.gate: ASKED if f.gate == "--backends" else "" for f in report.gates.failures if f.gate not in bounds}
    judged = any(result is not reference_of(report) for result in ran(report))
    found = []
    for flag, asks in bounds.items():
        failures = tuple(f"{one_line(f.result)}: {one_line(f.said)}" for f in report.gates.failures if f.gate == flag)
        status: Status = "failed" if failures else "off" if asks is None else "passed" if judged else "not judged"
        found.append(GateLine(flag=flag, asks=asks or "", status=status, failures=failures))
    return sorted(found, key=lambda gate: STATUSES.index(gate.status))


def counted(found: tuple[GateLine, ...]) -> str:
    """How many failed, passed and are off, in words."""
    counts = {status: sum(gate.status == status for gate in found) for status in STATUSES}
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n)


def _bounds(bounds: Gates, batches: list[int]) -> dict[str, str | None]:
    """What each flag asks; None if it is off."""
    drop, turned, slowest = bounds.max_map_drop, bounds.max_rank1_flips, bounds.max_p95_ms
    least = ", ".join(f"{precision} {value:g}" for precision, value in bounds.min_cosine.items())
    turning = "of the queries get a first answer that turns from right to wrong or back"
    cosine = "no crop's embedding turns further from the reference's than a cosine of"
    lengths = ", ".join(
        f"{precision} {percent(value, 2)}" for precision, value in (bounds.max_length_error or {}).items()
    )
    at = f" at batch {batches[0]}" if batches else ""
    return {
        "--max-map-drop": None if drop is None else f"mAP falls by at most {100 * drop:.2f} points",
        "--max-rank1-flips": None if turned is None else f"at most {percent(turned, 2)} {turning}",
        "--min-cosine": f"{cosine}: {least}" if least else None,
        "--max-length-error": f"no embedding's length differs more than: {lengths}" if lengths else None,
        "--max-p95-ms": None if slowest is None else f"95 of 100 calls{at} take at most {number(slowest)} ms",
    }
