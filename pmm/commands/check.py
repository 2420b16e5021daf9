"""The doctor of data sets: what is there, what is wrong with it, and whether it can be used.

pmm check --dataset NAME --root DIR [--json FILE] [--strict] [--threads N]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pmm.data.check import check, lines
from pmm.data.layouts import DATASETS
from pmm.utils import command_line
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import check_threads


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """`pmm check --dataset NAME --root DIR [--json FILE] [--strict] [--threads N]`"""

    dataset: Annotated[
        str, tyro.conf.arg(help=f"Data set: {', '.join(DATASETS)}; folder is one folder of crops per identity.")
    ]
    root: Path
    """Folder that holds the data set, or the one it lies in under its usual name."""
    json: Path | None = None
    """Also write everything, with every file it is about, to this file."""
    strict: bool = False
    """Warnings too make the exit code 1."""
    threads: int = 0
    """Threads that read images (0: one per core)."""


def main(prog: str) -> int:
    """Entry point: 0 if the data set is usable."""
    command = command_line.parse(CheckCommand, prog=prog, description=__doc__ or "")
    check_threads(command.threads)
    if command.json:
        output_file(command.json)
    report = check(command.dataset, command.root, threads=command.threads, label=prog)
    print("\n".join(lines(report)))
    if command.json:
        write_file(command.json, json.dumps(report.to_dict(), indent=2) + "\n")
    return int(not report.usable or (command.strict and bool(report.of_level("warning"))))
