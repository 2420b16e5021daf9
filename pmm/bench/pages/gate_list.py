"""The gates of a run in words: what each requires, and which results fail it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmm.bench.pages.format import number, one_line, percent
from pmm.bench.pages.queries import batch_sizes, ran, reference_of
from pmm.bench.schema import BenchReport, Gates

BACKENDS_RUN = "every backend that the command line names runs, and no backend fails"

Status = Literal["failed", "passed", "not judged", "off"]
STATUSES: tuple[Status, ...] = ("failed", "passed", "not judged", "off")


@dataclass(frozen=True, kw_only=True)
class GateLine:
    """One gate: what it requires, and which results fail it."""

    flag: str
    requirement: str
    status: Status
    """not judged: there is no result that it applies to."""
    failures: tuple[str, ...] = ()
    """One line each: the result and its figure."""


def gates(report: BenchReport) -> list[GateLine]:
    """Every gate, the failed ones first, those that are off last."""
    bounds = _bounds(report.gates, batch_sizes(report))
    # --backends has no bound, so only its failures are in the report; a gate that is unknown here must not vanish
    unlisted = {failure.gate for failure in report.gates.failures} - bounds.keys()
    bounds |= {gate: BACKENDS_RUN if gate == "--backends" else "" for gate in sorted(unlisted)}
    judged = any(result is not reference_of(report) for result in ran(report))
    gate_lines = []
    for flag, requirement in bounds.items():
        failures = tuple(f"{one_line(f.result)}: {one_line(f.said)}" for f in report.gates.failures if f.gate == flag)
        status: Status = "passed" if judged else "not judged"
        if failures or requirement is None:
            status = "failed" if failures else "off"
        gate_lines.append(GateLine(flag=flag, requirement=requirement or "", status=status, failures=failures))
    return sorted(gate_lines, key=lambda gate: STATUSES.index(gate.status))


def count_by_status(gate_lines: tuple[GateLine, ...]) -> str:
    """How many failed, passed and are off: "1 failed, 3 passed, 1 off"."""
    counts = {status: sum(gate.status == status for gate in gate_lines) for status in STATUSES}
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n)


def _bounds(bounds: Gates, batches: list[int]) -> dict[str, str | None]:
    """What each flag requires; None if it is off."""
    drop, flips, slowest = bounds.max_map_drop, bounds.max_rank1_flips, bounds.max_p95_ms
    cosines = ", ".join(f"{precision} {value:g}" for precision, value in bounds.min_cosine.items())
    norms = ", ".join(f"{name} {percent(value, 2)}" for name, value in (bounds.max_length_error or {}).items())
    near = "each embedding's cosine with the reference's is at least"
    as_long = "each embedding's norm differs from the reference's by at most"
    flipped = "the first gallery crop turns from right to wrong, or back, for at most"
    at = f" at batch {batches[0]}" if batches else ""
    return {
        "--max-map-drop": None if drop is None else f"mAP falls by at most {100 * drop:.2f} points",
        "--max-rank1-flips": None if flips is None else f"{flipped} {percent(flips, 2)} of the queries",
        "--min-cosine": f"{near}: {cosines}" if cosines else None,
        "--max-norm-error": f"{as_long}: {norms}" if norms else None,
        "--max-p95-ms": None if slowest is None else f"the p95 latency{at} is at most {number(slowest)} ms",
    }
