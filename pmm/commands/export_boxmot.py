"""Export a checkpoint for BoxMOT: an ONNX file, verified against the checkpoint, and the sidecar that BoxMOT reads.

With --openvino also the folder that its OpenVINO backend opens.

pmm export boxmot CKPT -o DIR|FILE.onnx
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.artifacts.kinds import require_kind
from pmm.export.options import VerifyOptions
from pmm.utils import command_line
from pmm.utils.arguments import Arg


@dataclass(frozen=True, kw_only=True)
class ExportBoxmotCommand:
    """`pmm export boxmot CKPT -o DIR|FILE.onnx`"""

    checkpoint: Annotated[Path, Arg("CKPT", positional=True)]
    """Checkpoint written by pmm train or pmm adopt, or ONNX file of pmm adopt that takes what BoxMOT feeds."""
    out: Annotated[Path, Arg("DIR|FILE.onnx", short="-o")]
    """File to write, or the folder for one that is named after the checkpoint; the sidecar is written beside it."""
    flip_tta: bool = False
    """Output the mean of the embeddings of the crop and of its mirror image: twice the work."""
    openvino: bool = False
    """Write FILE_openvino_model for BoxMOT's OpenVINO backend, too."""
    verification: VerifyOptions = field(default_factory=VerifyOptions)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportBoxmotCommand, prog=prog, description=__doc__ or "")
    require_kind(command.checkpoint, "checkpoint", "onnx")

    from pmm.export.boxmot import export_boxmot
    from pmm.export.onnx import describe_export

    model = export_boxmot(
        command.checkpoint,
        command.out,
        flip_tta=command.flip_tta,
        openvino=command.openvino,
        verification=command.verification,
    )
    print(describe_export(model.artifact))
    for file in model.files:
        print(f"give BoxMOT {file}")
    for note in model.notes:
        command_line.note(prog, note)
