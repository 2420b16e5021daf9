"""Checkpoint or ONNX file -> TensorRT or TensorRT-RTX engine, each step proved. Loads torch for a checkpoint only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pmm.artifacts.artifact import Artifact
from pmm.artifacts.kinds import ENGINE_SUFFIXES, kind_among
from pmm.artifacts.onnx_file import read_onnx
from pmm.export.options import EngineOptions, ExportOptions, VerifyOptions, check_same_precision
from pmm.export.reference import engine_parity_check
from pmm.export.trt import choose_flavor, engine_from_onnx
from pmm.utils.errors import InvalidFile
from pmm.utils.files import output_file


def build_engine(
    model: str | Path,
    out: str | Path,
    options: EngineOptions | None = None,
    *,
    export_options: ExportOptions | None = None,
    verification: VerifyOptions | None = None,
    exported: Callable[[Artifact], None] | None = None,
) -> Artifact:
    """Build the engine `out` (.plan) from a checkpoint, by way of a verified ONNX file beside `out`, or an ONNX file.

    TensorRT builds on a machine with an NVIDIA GPU only; TensorRT-RTX builds anywhere, and its engines run on GPUs of
    compute capability 7.5 and more. Where a GPU runs the engine, its embeddings of real crops are compared with the
    checkpoint's before it gets its name.

    Args:
        model: a checkpoint, or an ONNX file written by `pmm.export_onnx` (then no torch is needed).
        options: batch sizes, builder, GPU.
        export_options: precision and inputs of the ONNX file to export; of a `model` that is one, its precision.
        verification: the crops to compare on (default: test crops of the data set that the checkpoint names).
        exported: called with the ONNX file that was exported from a checkpoint, before the engine is built.

    Raises:
        InvalidFile: crops or files are missing, or the engine computes in another precision.
        ParityFailed: the embeddings moved; no engine is left.
        BackendUnavailable: no builder for this machine.

    Example:
        >>> artifact = pmm.build_engine("best.onnx", "best.plan", pmm.EngineOptions(batch=((1, 8, 64),), flavor="rtx"))
        >>> artifact.manifest.precision_found
        'fp32'
    """
    options, verification = options or EngineOptions(), verification or VerifyOptions()
    source = Path(model)
    target = output_file(Path(out), source, suffixes=ENGINE_SUFFIXES)
    checkpoint = source if kind_among(source, "checkpoint", "onnx") == "checkpoint" else None
    onnx = source
    if checkpoint:
        onnx = output_file(target.with_suffix(".onnx"), source)
        artifact = _onnx(checkpoint, onnx, export_options or ExportOptions(), verification)
        if exported:
            exported(artifact)
    file = read_onnx(onnx)
    if file.stored_manifest is None:
        hint = "export the checkpoint with pmm export onnx, or build an engine that is not verified with --no-manifest"
        raise InvalidFile("an ONNX file without a manifest", path=onnx, hint=hint)
    if export_options:
        check_same_precision(onnx, file.manifest.precision, export_options.precision)
    options = dataclasses.replace(options, flavor=choose_flavor(options.flavor, onnx, options.device)[0])
    parity_check = engine_parity_check(file, checkpoint, verification, options.flavor, options.device)
    return engine_from_onnx(file, target, options, parity_check=parity_check)


def _onnx(checkpoint: Path, out: Path, export_options: ExportOptions, verification: VerifyOptions) -> Artifact:
    from pmm.export.onnx import check_overwrite, export_onnx, export_onnx_cached

    check_overwrite(out, checkpoint, export_options)
    # a cached file was verified on the crops of the checkpoint
    usual_crops = verification in (VerifyOptions(), VerifyOptions(no_verify=True))
    return (export_onnx_cached if usual_crops else export_onnx)(checkpoint, out, export_options, verification)
