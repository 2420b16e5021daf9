"""Check a data set: its counts, what is wrong with it, and whether it can be used.

pmm check --dataset NAME --root DIR [--json FILE] [--strict] [--threads N]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.data.check import check, lines
from pmm.data.dataset_specs import DATASETS, FOLDER_HELP
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import check_threads


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """`pmm check --dataset NAME --root DIR [--json FILE] [--strict] [--threads N]`"""

    dataset: Annotated[str, Arg("NAME", help=f"Data set: {', '.join(DATASETS)}; {FOLDER_HELP}.")]
    root: Annotated[Path, Arg("DIR")]
    """Folder of the data set, or the folder that has it under its usual name."""
    json: Annotated[Path | None, Arg("FILE")] = None
    """Also write all findings, with the files of each, to this file."""
    strict: bool = False
    """Exit with code 1 for warnings too."""
    threads: int = 0
    """Threads that read images (default: one per core)."""

    def __post_init__(self) -> None:
        check_threads(self.threads)


def main(prog: str) -> int:
    """Entry point: 0 if the data set is usable."""
    command = command_line.parse(CheckCommand, prog=prog, description=__doc__ or "")
    if command.json:
        output_file(command.json)
    report = check(command.dataset, command.root, threads=command.threads, label=prog)
    print("\n".join(lines(report)))
    if command.json:
        write_file(command.json, json.dumps(report.to_dict(), indent=2) + "\n")
    return int(not report.usable or (command.strict and bool(report.of_level("warning"))))
