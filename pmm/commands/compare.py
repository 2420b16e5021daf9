"""Compare two reports of pmm bench: what became slower or less accurate, beyond noise?

pmm compare OLD.json NEW.json [--max-slowdown 0.05] [--max-map-drop 0.001]

The exit code is 1 if anything did: a gate for continuous integration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.bench.comparison import compare, hardware
from pmm.bench.schema import read_report
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import printable
from pmm.utils.files import existing_file

MARKS = {"worse": "WORSE ", "better": "better", "same": "same  ", "unknown": "?     "}


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """`pmm compare OLD.json NEW.json`"""

    old: Annotated[Path, Arg("OLD.json", positional=True)]
    """The earlier report.json."""
    new: Annotated[Path, Arg("NEW.json", positional=True)]
    """The later report.json."""
    max_slowdown: Annotated[float, Arg(least=0, most=1)] = 0.05
    """Largest share by which a median latency may grow."""
    max_map_drop: Annotated[float, Arg(least=0, most=1)] = 0.001
    """Most that mAP may fall, as a fraction."""


def main(prog: str) -> int:
    """Entry point."""
    command = command_line.parse(CompareCommand, prog=prog, description=__doc__ or "")
    old, new = (read_report(existing_file(path, "a report.json")) for path in (command.old, command.new))
    changes = compare(old, new, max_slowdown=command.max_slowdown, max_map_drop=command.max_map_drop)
    if hardware(old) != hardware(new):
        print(f"different hardware: {hardware(old)} -> {hardware(new)}; speedups are compared instead of latencies")
    width = max(len(f"{change.result}, {change.figure}") for change in changes)
    for change in changes:
        print(printable(f"{MARKS[change.kind]}  {f'{change.result}, {change.figure}':<{width}}  {change.summary}"))
    worse = sum(change.kind == "worse" for change in changes)
    unknown = sum(change.kind == "unknown" for change in changes)
    total = f"{worse or 'none'} of {len(changes)} figures {'is' if worse == 1 else 'are'} worse"
    print(f"{total}; {unknown} could not be judged" if unknown else total)
    return 1 if worse else 0
