"""Measure backends on one checkpoint: does the ranking survive, and how long does inference take?

pmm bench [CKPT | ARTIFACT ...] [--backends all] [--precisions all] [--dataset NAME --root DIR] [--out DIR]

Writes report.json, report.md and report.html; exit code 1 if a gate fails.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from pmm.bench.gates import GateFlags
from pmm.bench.harness import Bench
from pmm.bench.pages.pictures import pictures
from pmm.bench.pages.report import table, write_reports
from pmm.bench.request import Options, requested
from pmm.bench.resume_store import clear
from pmm.utils import command_line
from pmm.utils.build_info import describe_build
from pmm.utils.files import claimed, write_file


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """`pmm bench [CKPT | ARTIFACT ...]`"""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A checkpoint, or artifacts exported from one, or both (default: best.pth of the newest run under runs/)."""
    options: Options = field(default_factory=Options)
    gates: GateFlags = field(default_factory=GateFlags)


def main(prog: str) -> int:
    """Entry point."""
    command = command_line.parse(BenchCommand, prog=prog, description=__doc__ or "")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended is interrupted: workers end too
    request = requested(command.files, command.options, command.gates.parsed())
    with claimed(request.out):
        try:
            with Bench(request) as bench:
                bench.measure_accuracy()
                bench.measure_latency()
                report = bench.report()
        except KeyboardInterrupt:
            print(f"{prog}: what is finished is kept; go on with --resume", file=sys.stderr)
            raise
        write_file(request.out / "report.json", report.to_json())  # figures must not be lost over a picture
        write_reports(report, request.out, pictures(report, bench.judge, bench.reference))
        clear(request.out)
    print(table(report))
    print(f"kernels of the mix (training only): {describe_build(report.environment['kernels'])}")
    print(f"report: {(request.out / 'report.html').resolve()}")
    return 1 if report.gates.failures else 0
