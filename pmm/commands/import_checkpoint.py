"""Convert a checkpoint of the PMM authors' public code, or of BDB's, to a checkpoint for all other commands.

pmm import FILE.pth.tar -o CKPT.pth [--dataset NAME --root DIR] [--height H --width W]
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.config import MAX_SIDE
from pmm.data.dataset_specs import dataset_spec
from pmm.data.measure_crops import crop_statistics
from pmm.data.preprocessing import Resize
from pmm.data.readers import DEFAULT_DATASET, read_dataset
from pmm.data.samples import class_indices
from pmm.presets import preset
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.files import existing_file, output_file


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """`pmm import FILE -o CKPT.pth`"""

    file: Annotated[Path, Arg("FILE", positional=True)]
    """Checkpoint of the PMM authors' code or of BDB's (.pth.tar)."""
    out: Annotated[Path, Arg("CKPT.pth", short="-o")]
    """Checkpoint to write (.pth)."""
    dataset: Annotated[str, Arg("NAME")] = DEFAULT_DATASET
    """Data set that it was trained on."""
    root: Annotated[Path | None, Arg("DIR")] = None
    """Folder of the data set (default: none, and later commands need --root)."""
    height: Annotated[int, Arg(least=1, most=MAX_SIDE)] = 384
    """Height in pixels of the crops it was trained on."""
    width: Annotated[int, Arg(least=1, most=MAX_SIDE)] = 128
    """Width in pixels of the crops it was trained on."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ImportCommand, prog=prog, description=__doc__ or "")
    existing_file(command.file, "a checkpoint to import (.pth.tar)")
    output_file(command.out, command.file, suffixes=(".pth",))
    dataset_spec(command.dataset)  # a wrong name or folder would be noticed only by later commands
    train = read_dataset(command.dataset, command.root).train if command.root else ()
    data = dataclasses.replace(
        preset("paper").data,
        dataset=command.dataset,
        root=str(command.root or ""),
        height=command.height,
        width=command.width,
    )

    from pmm.artifacts.checkpoint_import import import_checkpoint

    statistics = crop_statistics([sample.path for sample in train], Resize(height=data.height, width=data.width))
    identities = len(class_indices(train)) or None
    print(import_checkpoint(command.file, command.out, data, identities=identities, statistics=statistics))
    out = shlex.quote(str(command.out))
    print(
        f"{out} is written; next: pmm evaluate {out} --dataset {command.dataset} "
        f"--root {shlex.quote(str(command.root)) if command.root else 'DIR'}"
    )
