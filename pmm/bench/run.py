"""A whole run of the bench: measured, and its reports written."""

from __future__ import annotations

from pmm.bench.harness import Bench
from pmm.bench.pages.pictures import pictures
from pmm.bench.pages.report import write_reports
from pmm.bench.request import Request
from pmm.bench.resume_store import clear
from pmm.bench.schema import BenchReport
from pmm.utils.files import claimed, write_file


def run_bench(request: Request, prog: str = "pmm bench") -> BenchReport:
    """Measure what `request` asks for, and write report.json, report.md and report.html into its folder. What was
    finished when it is interrupted is kept for --resume. `prog` is the command, as notes name it.

    Raises CannotWrite if another process writes there, and UserError if the data set or the reference cannot be used.
    """
    with claimed(request.out):
        with Bench(request, prog) as bench:
            bench.measure_accuracy()
            bench.measure_latency()
            report = bench.report()
            if request.chain.gallery:
                write_file(request.out / "report.json", report.to_json())  # what follows may end in trouble
                report = bench.measure_chain(report)
        write_file(request.out / "report.json", report.to_json())  # figures must not be lost over a picture
        write_reports(report, request.out, pictures(report, bench.accuracy, bench.reference))
        clear(request.out)
    return report
