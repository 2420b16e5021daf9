"""Measure backends on one checkpoint: mAP and its change, latency; writes report.json, report.md and report.html.

python bench/run.py [CKPT] [--dataset NAME --root DIR] [--backends torch,ort-cpu] [--batches 1,8] [--out DIR]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

from pmm import cli
from pmm.bench.harness import bench, check_backends
from pmm.bench.latency import LatencyPlan
from pmm.bench.report import table, write_reports
from pmm.config import Config, fast_mode
from pmm.data.readers import read_dataset
from pmm.files import claimed, existing_file
from pmm.kernels import describe_build
from pmm.runs import newest_run

PROG = "bench/run.py"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python bench/run.py [CKPT] ...`"""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Checkpoint (default: best.pth of the newest run under runs/)."""
    dataset: str = ""
    """Data set (default: the one the checkpoint was trained on)."""
    root: str = ""
    """Folder of the data set (default: the one the checkpoint was trained on)."""
    backends: str = "torch,ort-cpu"
    """Backends, with commas between: torch, ort-cpu, tensorrt."""
    batches: str = "1,8"
    """Images per call to time, with commas between."""
    out: Path | None = None
    """Folder of the report (default: report/ beside the checkpoint)."""


def main() -> None:
    """Entry point."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    batches = cli.numbers(command.batches, flag="--batches")
    backends = cli.names(command.backends, flag="--backends")
    check_backends(backends)
    checkpoint = existing_file(command.checkpoint or newest_run(), "a checkpoint written by pmm.train")
    out = command.out or checkpoint.parent / "report"

    from pmm.checkpoint import load

    state = load(checkpoint)
    config = Config.from_dict(state["config"])
    data = dataclasses.replace(
        config.data, dataset=command.dataset or config.data.dataset, root=command.root or config.data.root
    )
    config = dataclasses.replace(config, data=data)
    split = read_dataset(data.dataset, data.root)
    plan = LatencyPlan(warmup=0.05, samples=10) if fast_mode() else LatencyPlan()
    with claimed(out):
        report, picture = bench(
            checkpoint, state, config, split, backends=backends, batches=batches, out=out, plan=plan
        )
        write_reports(report, out, picture)
    print(table(report))
    print(f"kernels of the mix (training only): {describe_build(report['environment']['kernels'])}")
    print(f"report: {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    cli.run(main, prog=PROG)
