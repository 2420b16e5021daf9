"""Build a TensorRT or TensorRT-RTX engine from a checkpoint, by way of a verified ONNX file.

python export/to_trt.py CKPT [-o FILE.plan]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pmm import cli
from pmm.files import existing_file, output_file

PROG = "to_trt.py"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python export/to_trt.py CKPT [-o FILE.plan]`"""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint written by pmm.train."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write (default: beside the checkpoint); the ONNX file lies beside it."""
    batch: tuple[int, int, int] = (1, 8, 64)
    """Least, best and most images per call that the engine is built for."""
    verify_root: str = ""
    """Data set whose test crops the ONNX file's parity check uses (default: the one trained on)."""
    no_verify: bool = False
    """Export without the parity check; the manifest says so."""


def main() -> None:
    """Entry point."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    checkpoint = existing_file(command.checkpoint, "a checkpoint written by pmm.train")
    out = output_file(command.output or checkpoint.with_suffix(".plan"), source=checkpoint)
    onnx_file = output_file(out.with_suffix(".onnx"), source=out)

    from pmm.export.trt import BatchProfile, build_engine

    least, best, most = command.batch
    profile = BatchProfile(least=least, best=best, most=most)

    from pmm.export.onnx import describe, export_onnx, verified_onnx

    if command.no_verify or command.verify_root:  # asked for: a file verified in another way does not do
        artifact = export_onnx(checkpoint, onnx_file, verify_root=command.verify_root, verify=not command.no_verify)
    else:
        artifact = verified_onnx(checkpoint, onnx_file)
    print(describe(artifact))
    engine = build_engine(onnx_file, out, profile)
    details = engine.manifest.engine or {}
    print(
        f"{out}: {details['flavor']} {details['version']} engine, batch {least} to {most} (best {best}), "
        f"{engine.manifest.precision_found}, {out.stat().st_size / 1e6:.1f} MB, built on {details['built_on']}"
    )


if __name__ == "__main__":
    cli.run(main, prog=PROG)
