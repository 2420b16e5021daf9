"""Build a TensorRT or TensorRT-RTX engine from a checkpoint (by way of a verified ONNX file) or from an ONNX file.

python export/to_trt.py CKPT_OR_ONNX [-o FILE.plan] [--precision fp16] [--batch 1 8 64]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pmm import cli
from pmm.errors import UserError
from pmm.export.recipe import EngineOptions, Recipe, Verification
from pmm.files import existing_file, output_file

PROG = "to_trt.py"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python export/to_trt.py CKPT_OR_ONNX [-o FILE.plan]`"""

    model: tyro.conf.Positional[Path]
    """Checkpoint written by pmm.train, or ONNX file written by export/to_onnx.py (then no torch is needed)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write (default: beside the model); a checkpoint's ONNX file is written beside it."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    recipe: Recipe = field(default_factory=Recipe)
    verification: Verification = field(default_factory=Verification)
    no_manifest: bool = False
    """Take an ONNX file that is not ours: no precision is asked for, nothing verified, and no runner here opens it."""


def main() -> None:
    """Entry point."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    model = existing_file(command.model, "a checkpoint written by pmm.train, or an ONNX file")
    out = output_file(command.output or model.with_suffix(".plan"), source=model)
    if model.suffix.lower() == ".onnx":
        _refuse_recipe_flags()
        onnx_file = model
    else:
        onnx_file = output_file(out.with_suffix(".onnx"), source=out)

        from pmm.export.onnx import describe, export_onnx, verified_onnx

        # asked for its own crops, or none: a file verified in another way does not do
        export = verified_onnx if command.verification == Verification() else export_onnx
        print(describe(export(model, onnx_file, command.recipe, command.verification)))

    from pmm.export.reference import engine_gate
    from pmm.export.trt import build_engine, build_foreign_engine, describe_engine
    from pmm.onnx_file import read_onnx

    file = read_onnx(onnx_file, external_data=command.no_manifest)
    if command.no_manifest:
        builder, found = build_foreign_engine(file, out, command.engine)
        print(f"{out}: {builder} engine, {found.precision}, without a manifest: its embeddings are for you to verify")
        return
    if "--precision" in cli.given_flags() and file.manifest.precision != command.recipe.precision:
        raise UserError(
            f"{onnx_file} holds {file.manifest.precision}, asked for {command.recipe.precision}: an engine keeps the "
            f"file's types; export the ONNX file with --precision {command.recipe.precision}"
        )
    gate = engine_gate(file, None if onnx_file == model else model, command.verification)
    print(describe_engine(build_engine(file, out, command.engine, gate=gate)))


def _refuse_recipe_flags() -> None:
    """What is decided in the ONNX file cannot be asked of the engine."""
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(Recipe)} - {"--precision"}
    given = sorted(flags & cli.given_flags())
    if given:
        raise UserError(f"{', '.join(given)}: decided in the ONNX file; give a checkpoint, or export the file anew")


if __name__ == "__main__":
    cli.run(main, prog=PROG)
