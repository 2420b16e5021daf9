"""One of the checks of `make gpu`, alone: what it found is printed, and written as JSON.

PYTHONPATH=. python -m bench.lab.gpu_check CHECK [FILE ...] --out FILE.json
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pmm.config import fast_mode
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import UserError
from pmm.utils.files import output_file, write_file

PROG = "bench.lab.gpu_check"
SCHEMA = "pmm-gpu-check-1"


@dataclass(frozen=True, kw_only=True)
class GpuCheckCommand:
    """`python -m bench.lab.gpu_check ...`"""

    check: Annotated[
        Literal["libraries", "throughput", "resume", "distributed", "engine"], Arg("CHECK", positional=True)
    ]
    """libraries: each library's CUDA; throughput: of training steps; resume: a run goes on to the bit; distributed: one
    process by NCCL; engine: an ENGINE and its CHECKPOINT."""
    files: Annotated[tuple[Path, ...], Arg("FILE", positional=True)] = ()
    """For engine: the engine, and the checkpoint that it came from."""
    device: str = "cuda"
    """Where: cpu, cuda, or cuda:N for the GPU of that number."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """For throughput: mixed precision."""
    steps: int = 200
    """For throughput: how many."""
    out: Path
    """JSON file to write."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GpuCheckCommand, prog=prog, description=__doc__ or "")
    out = output_file(command.out)
    if len(command.files) != (2 if command.check == "engine" else 0):
        raise UserError("engine takes two files, ENGINE and CHECKPOINT; the other checks take none")
    found = {"schema": SCHEMA, "check": command.check, "found": _check(command)}
    write_file(out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["found"], indent=1))


def _check(command: GpuCheckCommand) -> dict[str, Any]:
    """Raises UserError if what was found is not as it should be."""
    if command.check == "libraries":
        from bench.lab.gpu_libraries import cuda_majors

        return cuda_majors()
    if command.check == "engine":
        from bench.lab.gpu_engine import check_engine

        engine, checkpoint = command.files
        return check_engine(engine, checkpoint, command.device)
    from bench.lab import gpu_training
    from pmm.runtime.eager import torch_device

    device, fast = torch_device(command.device), fast_mode()
    if command.check == "throughput":
        return gpu_training.throughput(device, command.amp, steps=command.steps, fast=fast)
    if command.check == "resume":
        with tempfile.TemporaryDirectory() as folder:
            words = () if fast else ("--batch-size", "32")
            found = gpu_training.resumed(command.device, Path(folder), "tiny" if fast else "paper", words)
    else:
        found = gpu_training.distributed(device, fast=fast)
    if not found["same bits"]:
        raise UserError(f"{command.check}: the weights are not the same to the bit: {found}")
    return found


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
