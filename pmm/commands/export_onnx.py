"""Export a checkpoint to ONNX, with a manifest, and verify the file against the checkpoint on real crops.

Of an ONNX file of pmm adopt, make one in another precision, verified against the adopted one.

pmm export onnx CKPT [-o FILE.onnx] [--precision fp32|fp16|bf16|int8]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.artifacts.kinds import require_kind
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.utils import command_line
from pmm.utils.arguments import Arg


@dataclass(frozen=True, kw_only=True)
class ExportOnnxCommand:
    """`pmm export onnx CKPT [-o FILE.onnx]`"""

    checkpoint: Annotated[Path, Arg("CKPT", positional=True)]
    """Checkpoint written by pmm train or pmm adopt, or ONNX file of pmm adopt."""
    out: Annotated[Path | None, Arg("FILE.onnx", short="-o")] = None
    """File to write (default: beside the checkpoint, as best.onnx, best-fp16.onnx or best-int8-cpu.onnx)."""
    onnx: Annotated[ExportOptions, Arg(group="ONNX file")] = field(default_factory=ExportOptions)
    verification: VerifyOptions = field(default_factory=VerifyOptions)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportOnnxCommand, prog=prog, description=__doc__ or "")
    checkpoint = command.checkpoint
    require_kind(checkpoint, "checkpoint", "onnx")
    beside = checkpoint.with_name(f"{checkpoint.stem}{command.onnx.suffix}.onnx")

    from pmm.export.onnx import describe_export, export_onnx

    artifact = export_onnx(checkpoint, command.out or beside, command.onnx, command.verification)
    print(describe_export(artifact))
