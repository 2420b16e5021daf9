"""Verdicts, kept as they come, and the table of them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.mutants.copies import Outcome
from tests.mutants.planted import Fault

KILLED, HANG, BY_TIER, SURVIVED = "killed", "hang", "killed by the tier", "survived"
OPEN = "passed its killers"  # the tier has not run yet


class Results:
    """Verdicts by entry and state of the tree, a JSON line each."""

    def __init__(self, path: Path, state: str, *, again: bool) -> None:
        self._path, self._state, self._lock = path, state, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._found: dict[str, dict[str, Any]] = {}
        if again:
            path.unlink(missing_ok=True)
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # half a line, of a run that was killed
                entry = json.loads(line)
                self._found[entry["key"]] = entry

    def of(self, fault: Fault) -> dict[str, Any]:
        """`verdict`, `by` (a test) and `seconds`; empty if it has not been judged."""
        return self._found.get(self._key(fault), {})

    def keep(self, fault: Fault, said: str, outcome: Outcome) -> None:
        """Write a verdict down, and say it."""
        key, seconds = self._key(fault), round(outcome.seconds + self.of(fault).get("seconds", 0.0), 1)
        line = {"key": key, "verdict": said, "by": outcome.failed, "seconds": seconds}
        with self._lock, self._path.open("a") as file:
            self._found[key] = line
            file.write(json.dumps(line) + "\n")
            print(f"{said:<18} {seconds:6.1f} s  {fault.id}  {outcome.failed}", flush=True)

    def _key(self, fault: Fault) -> str:
        return f"{fault.id} {fault.digest} {self._state}"


def table(faults: Sequence[Fault], results: Results) -> list[str]:
    """What became of each area, and the faults that live."""
    kinds = (KILLED, HANG, BY_TIER, SURVIVED, OPEN)
    lines = [f"{'':<12} {'faults':>6}" + "".join(f"  {kind}" for kind in kinds) + "  seconds"]
    for area in [*sorted({fault.area for fault in faults}), "all"]:
        found = [(fault, results.of(fault)) for fault in faults if area in (fault.area, "all")]
        counts = [sum(each.get("verdict") == kind for _, each in found) for kind in kinds]
        seconds = sum(each.get("seconds", 0.0) for _, each in found)
        cells = "".join(f"  {count:>{len(kind)}}" for count, kind in zip(counts, kinds, strict=True))
        lines.append(f"{area:<12} {len(found):>6}{cells}  {seconds:>7.0f}")
    for fault in faults:
        found_of = results.of(fault)
        if found_of.get("verdict") in (BY_TIER, SURVIVED, OPEN):
            lines.append(f"{found_of['verdict']}: {fault.id}: {found_of['by'] or fault.why}")
    return lines
