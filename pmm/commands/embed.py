"""Embed every image of a folder into an index, for `pmm search`. Loads no torch for an ONNX file or an engine.

pmm embed ARTIFACT FOLDER -o OUT.npz [--backend NAME] [--device cuda:N]
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.embed import contract_of, embed_folder, images_below
from pmm.runtime.open import BACKEND_HELP, check_backend, open_runner
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.files import output_file
from pmm.utils.hardware import check_threads, cuda_index


@dataclass(frozen=True, kw_only=True)
class EmbedCommand:
    """`pmm embed ARTIFACT FOLDER -o OUT.npz`"""

    artifact: Annotated[Path, Arg("ARTIFACT", positional=True)]
    """Checkpoint, ONNX file, AOTInductor package or engine."""
    folder: Annotated[Path, Arg("FOLDER", positional=True)]
    """Folder of crops: every image in it and in its subfolders, hidden ones apart."""
    out: Annotated[Path, Arg("OUT.npz", short="-o")]
    """Index to write (.npz), for pmm search."""
    backend: Annotated[str, Arg("NAME", help=BACKEND_HELP)] = "auto"
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    batch_size: Annotated[int, Arg(short="-b", least=1)] = 64
    """Images per call."""
    threads: int = 0
    """CPU threads of the backend (default: its own choice)."""

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_threads(self.threads)
        cuda_index(self.device)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(EmbedCommand, prog=prog, description=__doc__ or "")
    files = images_below(command.folder)  # before a model is loaded for nothing
    output_file(command.out, command.artifact, suffixes=(".npz",))
    with open_runner(command.artifact, command.backend, device=command.device, threads=command.threads) as runner:
        contract = contract_of(command.artifact, runner)
        begin = time.perf_counter()
        index = embed_folder(runner, contract, command.folder, files, batch_size=command.batch_size, label=prog)
        seconds = time.perf_counter() - begin
    index.save(command.out)
    info = runner.info
    print(
        f"{command.out}: {len(index)} images, {index.embeddings.shape[1]} dimensions, {len(index) / seconds:.0f} "
        f"images/s with reading, {info.backend} in {info.precision} on {info.device} ({info.provider})"
    )
