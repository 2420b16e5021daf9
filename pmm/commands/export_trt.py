"""Build a TensorRT or TensorRT-RTX engine from a checkpoint (through a verified ONNX file) or from an ONNX file.

pmm export trt CKPT_OR_ONNX [-o FILE.plan] [--precision fp16] [--batch 1 8 64] [--device cuda:N]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.artifacts.kinds import ENGINE_SUFFIXES, require_kind
from pmm.artifacts.onnx_file import is_adopted_onnx
from pmm.export.options import EngineOptions, ExportOptions, VerifyOptions, check_flags
from pmm.runtime.trt_variant import gpu_for, gpu_here, library_name
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import BackendUnavailable
from pmm.utils.files import existing_file, output_file


@dataclass(frozen=True, kw_only=True)
class ExportTrtCommand:
    """`pmm export trt CKPT_OR_ONNX [-o FILE.plan]`"""

    model: Annotated[Path, Arg("CKPT_OR_ONNX", positional=True)]
    """Checkpoint, or ONNX file written by pmm export onnx or pmm adopt (then no torch is needed)."""
    out: Annotated[Path | None, Arg("FILE.plan", short="-o")] = None
    """Engine to write, with its ONNX file beside it (default: beside the model, as best.plan or best-fp16.plan)."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    onnx: Annotated[ExportOptions, Arg(group="ONNX file, of a checkpoint or an adopted one")] = field(
        default_factory=ExportOptions
    )
    verification: VerifyOptions = field(default_factory=VerifyOptions)
    profile_layers: bool = False
    """Time each layer on this machine's GPU: print a table, and write best.plan.layers.json beside the engine."""
    no_manifest: bool = False
    """Build from an ONNX file that pmm did not write: nothing is verified, and pmm cannot open the engine."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ExportTrtCommand, prog=prog, description=__doc__ or "")
    model = existing_file(command.model, "a checkpoint written by pmm train, or an ONNX file")
    from_checkpoint = require_kind(model, "checkpoint", "onnx") == "checkpoint"
    from_adopted = not from_checkpoint and is_adopted_onnx(model)
    stem = model.stem + command.onnx.suffix if from_checkpoint or from_adopted else model.stem
    out = output_file(command.out or model.with_name(f"{stem}.plan"), model, suffixes=ENGINE_SUFFIXES)
    flags = command_line.flags_in()
    check_flags(
        from_checkpoint,
        command.onnx,
        flags,
        profile_layers=command.profile_layers,
        no_manifest=command.no_manifest,
        adopted=from_adopted,
    )
    if command.profile_layers and not gpu_here(command.engine.device):
        raise BackendUnavailable(
            "--profile-layers runs the engine, and no NVIDIA GPU is visible here", hint="leave the flag out"
        )
    if command.no_manifest:
        from pmm.artifacts.onnx_file import read_onnx
        from pmm.export.trt import build_foreign_engine

        builder, measured = build_foreign_engine(
            read_onnx(model, external_data=True, foreign=True), out, command.engine
        )
        print(
            f"{out}: {builder} engine, {measured.precision}, without a manifest: its embeddings are for you to verify"
        )
        return
    from pmm.export.engine_description import describe_engine
    from pmm.export.onnx import describe_export
    from pmm.export.trt import build_engine, choose_flavor

    engine = command.engine
    if command.profile_layers:
        flavor, _ = choose_flavor(engine.flavor, model, engine.device)
        if not gpu_for(flavor, engine.device):
            raise BackendUnavailable(
                f"--profile-layers runs the engine, and no GPU here runs those of {library_name(flavor)}"
            )
    artifact = build_engine(
        model,
        out,
        engine,
        export_options=command.onnx if from_checkpoint or "--precision" in flags else None,
        verification=command.verification,
        exported=lambda onnx: print(describe_export(onnx)),
    )
    print(describe_engine(artifact, engine.device))
    if command.profile_layers:
        from pmm.export.layer_profile import layers_path, profile_layers, table

        print(table(profile_layers(artifact, engine.device)))
        print(f"layers: {layers_path(out)}")
