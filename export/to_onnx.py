"""Export a checkpoint to ONNX, with its manifest, proved against the checkpoint on real crops.

python export/to_onnx.py CKPT [-o FILE.onnx]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pmm import cli
from pmm.files import existing_file, output_file

PROG = "to_onnx.py"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python export/to_onnx.py CKPT [-o FILE.onnx]`"""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint written by pmm.train."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write (default: beside the checkpoint)."""
    verify_root: str = ""
    """Data set whose test crops the parity check uses (default: the one trained on)."""
    no_verify: bool = False
    """Export without the parity check; the manifest says so."""


def main() -> None:
    """Entry point."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    checkpoint = existing_file(command.checkpoint, "a checkpoint written by pmm.train")
    out = output_file(command.output or checkpoint.with_suffix(".onnx"), source=checkpoint)

    from pmm.export.onnx import describe, export_onnx

    artifact = export_onnx(checkpoint, out, verify_root=command.verify_root, verify=not command.no_verify)
    print(describe(artifact))


if __name__ == "__main__":
    cli.run(main, prog=PROG)
