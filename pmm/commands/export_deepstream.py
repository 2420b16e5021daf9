"""Export a checkpoint for the tracker of NVIDIA DeepStream: an ONNX file and the ReID section of its YAML.

The file takes pixels as they are and is verified against the checkpoint; DeepStream builds the engine of it.

pmm export deepstream CKPT -o DIR
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.artifacts.kinds import require_kind
from pmm.export.deepstream import DeepStreamOptions
from pmm.export.options import VerifyOptions
from pmm.utils import command_line
from pmm.utils.arguments import Arg


@dataclass(frozen=True, kw_only=True)
class ExportDeepStreamCommand:
    """`pmm export deepstream CKPT -o DIR`"""

    checkpoint: Annotated[Path, Arg("CKPT", positional=True)]
    """Checkpoint written by pmm train or pmm adopt."""
    out: Annotated[Path, Arg("DIR", short="-o")]
    """Folder to write to."""
    deepstream: Annotated[DeepStreamOptions, Arg(group="DeepStream")] = field(default_factory=DeepStreamOptions)
    verification: VerifyOptions = field(default_factory=VerifyOptions)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportDeepStreamCommand, prog=prog, description=__doc__ or "")
    require_kind(command.checkpoint, "checkpoint", "onnx")

    from pmm.export.deepstream import export_deepstream
    from pmm.export.onnx import describe_export

    model = export_deepstream(command.checkpoint, command.out, command.deepstream, command.verification)
    size = model.artifact.manifest.preprocessing
    print(describe_export(model.artifact))
    print(f"{model.section}: put it in place of the ReID section of the tracker's configuration")
    resized = f"{size.height}x{size.width}"
    command_line.note(prog, f"DeepStream resizes crops to {resized} in its own way, not by {size.filter_name}")
