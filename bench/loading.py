"""Time the loading of crops against a bare loop of PIL; the crops are compared first.

python bench/loading.py [--data DIR] [--workers N] [--out FILE.json]
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pmm import cli
from pmm.bench.latency import LatencyPlan
from pmm.config import fast_mode
from pmm.files import output_file, write_file
from pmm.machine import usable_cores

PROG = "bench/loading.py"
WORK = Path("runs/loading-bench")


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python bench/loading.py ...`"""

    data: Path | None = None
    """Folder of images to load (default: synthetic people, drawn for this run as files of three kinds)."""
    workers: int = 0
    """Processes of the bare loop and of the training loader, and threads of iter_crops (0: all cores)."""
    batches: int = 0
    """Training batches in a pass (0: as many as hold 1,024 crops, and for each worker the same)."""
    rounds: int = 12
    """Passes of each way that are timed."""
    out: Path = WORK / "loading.json"
    """JSON file to write."""


def main() -> int:
    """Entry point; 1 if the crops of one way are wrong."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    workers = cli.numbers(str(command.workers), flag="--workers", least=0)[0] or usable_cores()
    batches = cli.numbers(str(command.batches), flag="--batches", least=0)[0] or (workers if fast_mode() else 0)
    rounds = cli.numbers(str(command.rounds), flag="--rounds")[0]
    out = output_file(command.out)

    from pmm.bench.loading import bench_loading, draw_files, loading_plan, markdown

    plan: LatencyPlan = loading_plan(rounds, fast=fast_mode())
    with tempfile.TemporaryDirectory() as folder:
        if command.data is None:
            folders = draw_files(Path(folder), ids=4 if fast_mode() else 24, workers=workers)
        else:
            folders = {command.data.resolve().name: command.data}
        report = bench_loading(folders, workers=workers, batches=batches, plan=plan)
    write_file(out, json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    print(f"report: {out}")
    return 1 if any(setting["wrong"] for setting in report["settings"]) else 0


if __name__ == "__main__":
    cli.run(main, prog=PROG)
