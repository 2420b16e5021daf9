"""Write ONNX files and TensorRT engines into a Triton Inference Server model repository.

pmm export triton MODEL... --repo DIR [--name NAME] [--input jpeg]
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import PIL

from pmm.utils import command_line
from pmm.utils.arguments import Arg


@dataclass(frozen=True, kw_only=True)
class ExportTritonCommand:
    """`pmm export triton MODEL... --repo DIR`"""

    models: Annotated[tuple[Path, ...], Arg("MODEL", positional=True)]
    """ONNX files (.onnx) and TensorRT engines (.plan), with their manifests."""
    repo: Annotated[Path, Arg("DIR", short="-o")]
    """Model repository: the folder that the server is started with."""
    name: str = ""
    """Name of the model (default: the file's); with an ONNX file and an engine, NAME-onnx and NAME-trt."""
    input: Literal["pixels", "jpeg"] = "pixels"
    """pixels: crops, prepared by the client. jpeg: image files, too, JPEG and all others that Pillow reads, through the
    model NAME-jpeg, which prepares them in the server with numpy and Pillow."""
    max_batch: int | None = None
    """Most images per call (default: an engine's own limit; 64 for an ONNX file)."""
    queue_delay_us: int = 500
    """Longest wait for other requests to share a batch with, in microseconds."""
    instances: int = 1
    """Copies of each model, per GPU or per server without one."""
    overwrite: bool = False
    """Replace model folders that pmm export triton wrote before."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportTritonCommand, prog=prog, description=__doc__ or "")

    from pmm.export.triton import write_model_repository
    from pmm.export.triton_config import Serving

    serving = Serving(max_batch=command.max_batch, queue_delay_us=command.queue_delay_us, instances=command.instances)
    written = write_model_repository(
        command.models,
        command.repo,
        name=command.name,
        serving=serving,
        image_files=command.input == "jpeg",
        overwrite=command.overwrite,
    )
    for artifact, model in written:
        print("\n".join(model.describe(artifact.path.parents[1])))
    folder = shlex.quote(str(command.repo.resolve()))
    print(f"serve: tritonserver --model-repository={folder}")
    # a Python model hands its tensors over in /dev/shm, of which a container has 64 MB where it is not told otherwise
    memory = " --shm-size=1g" if command.input == "jpeg" else ""
    print(
        f"in a container: docker run --rm --gpus all{memory} -p 8000:8000 -p 8001:8001 -v {folder}:/models "
        "TRITON_IMAGE tritonserver --model-repository=/models"
    )
    if command.input == "jpeg":
        needs = f"the server's Python needs numpy and Pillow {PIL.__version__}"
        command_line.note(prog, f"{needs}: pip install pillow in its image")
    for version in sorted({model.manifest.engine.version for _, model in written if model.manifest.engine}):
        only = f"the engine loads only in a server whose TensorRT is {version}"
        command_line.note(prog, f"{only}, the version that built it")
