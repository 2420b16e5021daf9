"""Run one of the checks of `make gpu`; its result is printed, and written as JSON.

PYTHONPATH=. python -m bench.lab.gpu_check CHECK [FILE ...] --out FILE.json
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pmm.config import fast_mode
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.cuda_versions import misfits, side_by_side
from pmm.utils.errors import ConflictingOptions, UserError
from pmm.utils.files import output_file, write_file

PROG = "bench.lab.gpu_check"
SCHEMA = "pmm-gpu-check-1"


@dataclass(frozen=True, kw_only=True)
class GpuCheckCommand:
    """`python -m bench.lab.gpu_check ...`"""

    check: Annotated[
        Literal["libraries", "throughput", "epochs", "resume", "distributed", "engine"], Arg("CHECK", positional=True)
    ]
    """libraries: each library's CUDA; throughput: of training steps; epochs: of a whole run; resume: a run goes on to
    the bit; distributed: one process by NCCL; engine: an ENGINE and its CHECKPOINT."""
    files: Annotated[tuple[Path, ...], Arg("FILE", positional=True)] = ()
    """For engine: the engine, and the checkpoint that it came from."""
    device: str = "cuda"
    """Where: cpu, cuda, or cuda:N for the GPU of that number."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """For throughput and epochs: mixed precision."""
    steps: int = 200
    """For throughput: how many."""
    out: Path
    """JSON file to write."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GpuCheckCommand, prog=prog, description=__doc__ or "")
    out = output_file(command.out)
    if len(command.files) != (2 if command.check == "engine" else 0):
        problem = f"{command.check} with {len(command.files)} files"
        expected = "ENGINE and CHECKPOINT for engine, and no files for the other checks"
        raise ConflictingOptions(problem, "CHECK", "FILES", expected=expected)
    found = {"schema": SCHEMA, "check": command.check, "found": _check(command)}
    write_file(out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["found"], indent=1))


def _check(command: GpuCheckCommand) -> dict[str, Any]:
    """The result of the check. Raises UserError if it fails."""
    if command.check == "libraries":
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
    if command.check == "epochs":
        from bench.lab.gpu_epochs import EPOCHS, FIRST, HELD_OUT, check_epochs

        with tempfile.TemporaryDirectory() as folder:
            preset, epochs, held_out = ("tiny", FIRST, 0.25) if fast else ("paper", EPOCHS, HELD_OUT)
            return check_epochs(device, Path(folder), preset, ("--amp", command.amp), epochs=epochs, held_out=held_out)
    if command.check == "resume":
        with tempfile.TemporaryDirectory() as folder:
            words = () if fast else ("--batch-size", "32")
            found = gpu_training.check_resume(command.device, Path(folder), "tiny" if fast else "paper", words)
    else:
        found = gpu_training.check_distributed(device, fast=fast)
    if not found["same bits"]:
        raise UserError(f"{command.check}: the weights are not the same to the bit: {found}")
    return found


def cuda_majors() -> dict[str, Any]:
    """Library -> CUDA version by its files, the versions that loaded libraries report, and what does not fit.

    Raises UserError if a library reports another major version than its files.
    """
    by_files, by_libraries = side_by_side(), _reported_cuda()
    for name, version in by_libraries.items():
        if name in by_files and by_files[name].partition(".")[0] != version.partition(".")[0]:
            raise UserError(f"{name} is for CUDA {by_files[name]} by its files, and for CUDA {version} by the library")
    return {**by_files, "told by the library": by_libraries, "does not fit": [misfit.text for misfit in misfits()]}


def _reported_cuda() -> dict[str, str]:
    versions = {}
    with contextlib.suppress(ImportError):
        import torch

        versions["torch"] = torch.version.cuda or "none"
    with contextlib.suppress(ImportError):
        import onnxruntime

        if version := getattr(onnxruntime, "cuda_version", ""):
            versions["onnxruntime-gpu"] = str(version)
    return versions


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
