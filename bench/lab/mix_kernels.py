"""Time the fused mix against the authors' procedure, eager torch and torch.compile; each result is verified first.

python -m bench.lab.mix_kernels [--batches 32,64,128] [--dtypes float32] [--layouts nchw] [--out FILE.json]
python -m bench.lab.mix_kernels --step [--step-batch 8]: whole training steps of preset paper (random weights)
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from bench.lab.mix_report import COMPETITORS, DTYPES, LAYOUTS, check_names, markdown, over_limits
from pmm.config import fast_mode
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidValue
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import cuda_index, usable_cores

PROG = "bench.lab.mix_kernels"
WORK = Path("runs/ops-bench")


@dataclass(frozen=True, kw_only=True)
class MixKernelsCommand:
    """`python -m bench.lab.mix_kernels ...`"""

    batches: str = "32,64,128"
    """Samples per call, with commas between; maps are 2048x24x8."""
    dtypes: str = "float32,float16,bfloat16"
    """Precisions, with commas between: float32, float16, bfloat16."""
    layouts: str = "nchw,channels_last"
    """Memory layouts, with commas between: nchw, channels_last."""
    competitors: str = "authors,eager,compiled,ours"
    """What to measure, with commas between: authors, eager, compiled, ours."""
    device: str = "auto"
    """Where to measure: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    threads: Annotated[int, Arg(least=0)] = 0
    """CPU threads (0: all cores)."""
    step: bool = False
    """Time whole training steps of preset paper instead."""
    step_batch: int = 8
    """Images per training step."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision of the training steps."""
    limits: bool = False
    """Fail if a training step takes 3 % longer than one without mixing, or more than a third of one by the authors."""
    samples: Annotated[int, Arg(least=0)] = 0
    """Samples per figure (0: 30)."""
    budget: float = 0.0
    """Most seconds for one figure, which then has fewer samples (0: 4, or 100 for a training step)."""
    out: Path | None = None
    """JSON file to write (default: ops.json or step.json in runs/ops-bench)."""

    def __post_init__(self) -> None:
        if not self.budget >= 0:
            raise InvalidValue("budget", self.budget, "seconds, or 0 for the default")
        cuda_index(self.device)


def main(prog: str) -> int:
    """Entry point; 1 if a result is wrong."""
    command = command_line.parse(MixKernelsCommand, prog=prog, description=__doc__ or "")
    batches = command_line.numbers(command.batches, flag="--batches")
    dtypes = check_names("--dtypes", command_line.names(command.dtypes, flag="--dtypes"), DTYPES)
    layouts = check_names("--layouts", command_line.names(command.layouts, flag="--layouts"), LAYOUTS)
    competitors = check_names(
        "--competitors", command_line.names(command.competitors, flag="--competitors"), COMPETITORS
    )
    threads = command.threads or usable_cores()
    without = (
        {"--batches", "--dtypes", "--layouts", "--competitors"}
        if command.step
        else {"--step-batch", "--amp", "--limits"}
    )
    if unused := sorted(without & command_line.flags_in()):
        problem = f"{', '.join(unused)} has no effect {'with' if command.step else 'without'} --step"
        raise ConflictingOptions(problem, *unused, "--step")
    out = output_file(command.out or WORK / ("step.json" if command.step else "ops.json"))

    from bench.lab.mix_timing import bench_mixing, mixing_plan
    from bench.lab.training_step import bench_step, step_plan
    from pmm.runtime.eager import torch_device

    where: dict[str, Any] = {"device": torch_device(command.device), "threads": threads, "fast": fast_mode()}
    if command.step:
        plan = step_plan(command.samples, command.budget)
        report = bench_step(batch=command.step_batch, amp=command.amp, plan=plan, **where)
    else:
        plan = mixing_plan(command.samples, command.budget)
        report = bench_mixing(
            batches=batches, dtypes=dtypes, layouts=layouts, competitors=competitors, plan=plan, **where
        )
    write_file(out, json.dumps(report, indent=1) + "\n")
    print(f"{markdown(report)}\nreport: {out}")
    missed = over_limits(report) if command.limits else []
    for line in missed:
        print(f"limit: {line}", file=sys.stderr)
    return 0 if report["equal"] and not missed else 1


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
