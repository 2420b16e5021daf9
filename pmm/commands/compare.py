"""Compare two reports of pmm bench: what got slower or less accurate, beyond noise?

pmm compare OLD.json NEW.json [--max-slowdown 0.05] [--max-map-drop 0.001]

Exit code 1 if anything did: a gate for continuous integration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pmm.bench.comparison import compare, hardware
from pmm.bench.schema import read_report
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import existing_file

MARKS = {"worse": "WORSE ", "better": "better", "same": "same  ", "unknown": "?     "}


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """`pmm compare OLD.json NEW.json`"""

    old: tyro.conf.Positional[Path]
    """report.json of before."""
    new: tyro.conf.Positional[Path]
    """report.json of now."""
    max_slowdown: float = 0.05
    """Longer medians are allowed up to this share."""
    max_map_drop: float = 0.001
    """A fall of mAP is allowed up to this, as a fraction."""


def main(prog: str) -> int:
    """Entry point."""
    command = command_line.parse(CompareCommand, prog=prog, description=__doc__ or "")
    for flag, value in (("--max-slowdown", command.max_slowdown), ("--max-map-drop", command.max_map_drop)):
        if not 0 <= value <= 1:
            raise UserError(f"{flag} is {value}; expected a fraction from 0 to 1")
    old, new = (read_report(existing_file(path, "a report.json")) for path in (command.old, command.new))
    changes = compare(old, new, max_slowdown=command.max_slowdown, max_map_drop=command.max_map_drop)
    if hardware(old) != hardware(new):
        print(f"other hardware: {hardware(old)} -> {hardware(new)}; speed-ups over the reference are compared instead")
    width = max(len(f"{change.result}, {change.figure}") for change in changes)
    for change in changes:
        print(f"{MARKS[change.kind]}  {f'{change.result}, {change.figure}':<{width}}  {change.said}")
    worse = sum(change.kind == "worse" for change in changes)
    unknown = sum(change.kind == "unknown" for change in changes)
    said = f"{worse} of {len(changes)} figures are worse" if worse else f"nothing of {len(changes)} figures is worse"
    print(f"{said}; {unknown} could not be judged" if unknown else said)
    return 1 if worse else 0
