"""Measure backends on one model: does the ranking survive, and how long does inference take?

pmm bench [FILE ...] [--backends all] [--precisions all] [--dataset NAME --root DIR] [--gallery] [--out DIR] ...

Writes report.json, report.md and report.html. The exit code is 1 if a gate fails, and 2 for a wrong command line.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.bench.gates import GateFlags
from pmm.bench.pages.report import table
from pmm.bench.request import ChainOptions, Options, make_request
from pmm.bench.run import run_bench
from pmm.runtime.open import BACKENDS
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.extras import check_installed


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """`pmm bench [FILE ...]`"""

    files: Annotated[tuple[Path, ...], Arg("FILE", positional=True)] = ()
    """A checkpoint or an adopted ONNX file, files exported from it, or both (default: best.pth of the newest run under
    runs/)."""
    options: Options = field(default_factory=Options)
    chain: Annotated[ChainOptions, Arg(group="gallery")] = field(default_factory=ChainOptions)
    gates: Annotated[GateFlags, Arg(group="gates (a number, or off)")] = field(default_factory=GateFlags)


def main(prog: str) -> int:
    """Entry point."""
    command = command_line.parse(BenchCommand, prog=prog, description=__doc__ or "")
    without_torch = command.files and all(path.suffix.lower() == ".onnx" for path in command.files)
    # the last two for the report, at the end
    check_installed(*([] if without_torch else ["torch"]), "jinja2", "matplotlib")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended is interrupted: workers end too
    request = make_request(command.files, command.options, command.gates.parsed(), command.chain)
    check_installed(BACKENDS[request.reference.backend].library)
    try:
        report = run_bench(request, prog)
    except KeyboardInterrupt:
        print(f"{prog}: finished measurements are kept; continue with --resume", file=sys.stderr)
        raise
    print(table(report))
    print(f"report: {(request.out / 'report.html').resolve()}")
    return 1 if report.gates.failures else 0
