"""Compile a checkpoint to an AOTInductor package, with a manifest, and verify it against the checkpoint on real crops.

pmm export aoti CKPT [-o FILE.pt2] [--precision fp32|tf32|fp16|bf16] [--device cpu|cuda|cuda:N]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.artifacts.kinds import PACKAGE_SUFFIX
from pmm.export.aoti import PackagePrecision
from pmm.export.options import VerifyOptions
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidValue
from pmm.utils.files import existing_file
from pmm.utils.hardware import cuda_index


@dataclass(frozen=True, kw_only=True)
class ExportAotiCommand:
    """`pmm export aoti CKPT [-o FILE.pt2]`"""

    checkpoint: Annotated[Path, Arg("CKPT", positional=True)]
    """Checkpoint written by pmm train or pmm adopt."""
    out: Annotated[Path | None, Arg("FILE.pt2", short="-o")] = None
    """File to write (default: beside the checkpoint, as best-cpu.pt2 or best-cuda-fp16.pt2)."""
    precision: PackagePrecision = "fp32"
    """Precision of the backbone; the heads and the output are fp32 in every file. tf32 is for GPUs."""
    device: str = "cpu"
    """Processor to compile for: cpu, cuda or cuda:N; the package runs only on processors like it."""
    verification: VerifyOptions = field(default_factory=VerifyOptions)

    def __post_init__(self) -> None:
        if self.device == "auto":
            raise InvalidValue("device", "auto", "cpu, cuda or cuda:N: a package is for one kind of processor")
        if cuda_index(self.device) is None and self.precision == "tf32":
            problem, hint = "--precision tf32 is for GPUs, and --device is cpu", "use --precision fp32 or --device cuda"
            raise ConflictingOptions(problem, "--precision", "--device", hint=hint)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportAotiCommand, prog=prog, description=__doc__ or "")
    kind = "cpu" if command.device == "cpu" else "cuda"
    checkpoint = existing_file(command.checkpoint, "a checkpoint written by pmm train")
    precision = "" if command.precision == "fp32" else f"-{command.precision}"
    beside = checkpoint.with_name(f"{checkpoint.stem}-{kind}{precision}{PACKAGE_SUFFIX}")
    out = command.out or beside

    from pmm.export.aoti import describe_package, export_aoti

    artifact = export_aoti(checkpoint, out, command.precision, command.device, command.verification)
    print(describe_package(artifact))
