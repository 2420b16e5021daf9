"""Export a checkpoint to OpenVINO's IR, which takes crops of any size: they are resized and normalised inside.

It is compared with the ONNX file that it is made of, which is verified against the checkpoint. On CPUs with bf16
instructions OpenVINO computes in bf16 unless the program that runs it sets INFERENCE_PRECISION_HINT to f32.

pmm export openvino CKPT -o DIR
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pmm.artifacts.kinds import require_kind
from pmm.export.options import VerifyOptions
from pmm.utils import command_line
from pmm.utils.arguments import Arg


@dataclass(frozen=True, kw_only=True)
class ExportOpenVinoCommand:
    """`pmm export openvino CKPT -o DIR`"""

    checkpoint: Annotated[Path, Arg("CKPT", positional=True)]
    """Checkpoint written by pmm train or pmm adopt, or ONNX file of pmm adopt."""
    out: Annotated[Path, Arg("DIR", short="-o")]
    """Folder to write to."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Precision of the backbone; int8 is calibrated on the training set."""
    normalize: bool = False
    """Normalise embeddings to norm 1, to compare by cosine; a checkpoint with metric cosine always does."""
    flip_tta: bool = False
    """Output the mean of the embeddings of the crop and of its mirror image: twice the work."""
    verification: VerifyOptions = field(default_factory=VerifyOptions)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportOpenVinoCommand, prog=prog, description=__doc__ or "")
    require_kind(command.checkpoint, "checkpoint", "onnx")

    from pmm.export.onnx import describe_export
    from pmm.export.openvino import export_openvino

    model = export_openvino(
        command.checkpoint,
        command.out,
        precision=command.precision,
        normalize=command.normalize,
        flip_tta=command.flip_tta,
        verification=command.verification,
    )
    print(describe_export(model.artifact))
    print(model.describe())
    command_line.note(prog, "OpenVINO computes in bf16 where the CPU has it; INFERENCE_PRECISION_HINT f32 keeps fp32")
