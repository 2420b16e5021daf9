"""Time the exports of a model in every precision, and int8 against fp32 on this CPU; each file is proved first.

python bench/export.py [CKPT] [--root DIR] [--out FILE.json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from pmm import cli
from pmm.bench.latency import LatencyPlan
from pmm.config import Config, fast_mode, preset
from pmm.files import existing_file, make_folder, output_file, write_file
from pmm.kernels import describe_build

PROG = "bench/export.py"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python bench/export.py [CKPT]`"""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Checkpoint (default: preset paper with random weights, its batch-norm statistics from 256 crops)."""
    root: Path = Path("runs/demo/data")
    """Data set to verify and calibrate on."""
    batches: str = "1,8"
    """Images per call to time, with commas between."""
    work: Path = Path("runs/export-bench")
    """Folder for the files that are made."""
    out: Path | None = None
    """JSON file to write (default: export.json in the work folder)."""


def main() -> None:
    """Entry point."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    batches = cli.numbers(command.batches, flag="--batches")
    out = output_file(command.out or make_folder(command.work) / "export.json")

    from pmm.bench.exporting import bench_export, markdown

    if command.checkpoint:
        from pmm.checkpoint import load

        checkpoint = existing_file(command.checkpoint, "a checkpoint written by pmm.train")
        config = Config.from_dict(load(checkpoint)["config"])
    else:
        from pmm.bench.untrained import untrained_checkpoint

        config = preset("paper")
        checkpoint = untrained_checkpoint(config, command.root, command.work / "paper.pth")
    plan = LatencyPlan(warmup=0.05, samples=10) if fast_mode() else LatencyPlan(samples=60, budget=30.0)
    report = bench_export(checkpoint, config, command.root, command.work, batches=batches, plan=plan)
    write_file(out, json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    print(f"kernels of the mix (training only): {describe_build(report['environment']['kernels'])}")
    print(f"report: {out}")


if __name__ == "__main__":
    cli.run(main, prog=PROG)
