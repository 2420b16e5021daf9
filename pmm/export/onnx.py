"""Checkpoint or adopted ONNX file -> ONNX file with its manifest, proved against its source on real crops before it
gets its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.artifacts.artifact import Artifact, ArtifactDraft, new_artifact, read_manifest
from pmm.artifacts.manifest import Manifest
from pmm.artifacts.onnx_content import graph_digest
from pmm.artifacts.onnx_file import embed_manifest, is_onnx
from pmm.data.preprocessing import Crops
from pmm.export.cached import reusable
from pmm.export.calibration import calibration_crops
from pmm.export.graph_folding import opset_of
from pmm.export.half_fallback import half_with_fallback
from pmm.export.half_precision import emulated, half_type
from pmm.export.int8_graph import is_quantized_so, quantize_graph
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityCheck
from pmm.export.precision import onnx_precision
from pmm.export.reference import changed_meanwhile, in_memory
from pmm.export.selftest import add_selftest
from pmm.export.source import ExportSource, open_source
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import CannotWrite, InvalidFile, UserError
from pmm.utils.files import output_file, sha256

if TYPE_CHECKING:
    import onnx


def export_onnx(
    checkpoint: str | Path,
    out: str | Path,
    options: ExportOptions | None = None,
    verification: VerifyOptions | None = None,
    *,
    before_named: Callable[[ArtifactDraft], None] | None = None,
) -> Artifact:
    """Write the deployed graph of `checkpoint` to `out` with `options`, and its manifest beside it.

    The batch is dynamic unless `options` has a static one, batch-norm is folded. The file gets its name only after its
    precision was read back from it and, unless `verification` switches it off, its embeddings of real crops equalled
    the fp32 checkpoint's.

    Args:
        checkpoint: or an ONNX file of pmm adopt, which has decided everything but the precision.
        before_named: called with the whole draft; if it raises, nothing is written.

    Raises:
        InvalidFile: a bad checkpoint, no crops to verify or calibrate on, or another precision in the file.
        ConflictingOptions: `options` about what an adopted file has decided.
        ParityFailed: the embeddings moved; no file is left.

    Examples:
        >>> artifact = pmm.export_onnx("best.pth", "best-fp16.onnx", pmm.ExportOptions(precision="fp16"))
        >>> artifact.manifest.precision_found, artifact.manifest.parity["min_cosine"] > 0.999
        ('fp16', True)
    """
    checkpoint = Path(checkpoint)
    out = output_file(Path(out), checkpoint, suffixes=(".onnx",))
    options, verification = options or ExportOptions(), verification or VerifyOptions()
    source = open_source(checkpoint)
    # everything that can be refused is, before the work begins
    source.check(options)
    parity_check = source.parity_check(options, verification)
    calibration = calibration_crops(source, options) if options.precision == "int8" else None
    proto, quantization = _build(source, options, calibration, parity_check, str(out))
    measured = onnx_precision(proto, out)
    measured.check(options.precision, out, kept=bool((quantization or {}).get("kept_in_fp32")))
    if sha256(checkpoint) != source.sha256:
        raise changed_meanwhile(checkpoint)
    manifest = Manifest(
        checkpoint_sha256=source.sha256,
        method=source.method,
        preprocessing=source.fed(options),
        input=source.input(options),
        embedding=source.embedding(options),
        precision=options.precision,
        precision_found=measured.precision,
        precision_share=measured.share,
        macs=measured.total,
        opset=opset_of(proto),
        quantization=quantization,
        graph=graph_digest(proto),
        versions=_versions(source),
        adopted=source.adopted,
        crop_statistics=source.crop_statistics,
    )
    with new_artifact(out, manifest) as draft:
        embed_manifest(proto, manifest)
        draft.path.write_bytes(proto.SerializeToString(deterministic=True))
        if parity_check:
            draft.manifest = dataclasses.replace(
                manifest, parity=_verify(parity_check, draft.path, proto, manifest, str(out))
            )
        with OrtRunner(draft.path, warn=False) if manifest.precision != "bf16" else nullcontext() as runner:
            add_selftest(draft, source.selftest_vectors(options), runner)
        if before_named:
            before_named(draft)
    return Artifact(out, draft.manifest)


def export_onnx_cached(
    checkpoint: Path, out: Path, options: ExportOptions | None = None, verification: VerifyOptions | None = None
) -> Artifact:
    """`out` if it is what `export_onnx` would make here (`pmm.export.cached.reusable`), else a new export."""
    options, verification = options or ExportOptions(), verification or VerifyOptions()

    def is_same(manifest: Manifest) -> bool:
        if manifest.checkpoint_sha256 != sha256(checkpoint) or options.calibration_root:
            return False  # a folder of crops may hold others now
        source = open_source(checkpoint)
        return manifest.made_from(source.sha256, _versions(source)) and _has_options(manifest, source, options)

    cached = reusable(out, is_same, verified=not verification.no_verify)
    return cached or export_onnx(checkpoint, out, options, verification)


def check_overwrite(out: Path, checkpoint: Path, options: ExportOptions) -> None:
    """Raises CannotWrite if `out`, a name that the user did not choose, holds a file that pmm did not write, or another
    export of `checkpoint`: neither may be replaced unasked."""
    if not out.is_file():
        return
    hint = "move it away, or give another name with -o"
    try:
        manifest = read_manifest(out)
    except UserError as error:
        if not is_onnx(out):
            return  # a damaged file is made anew
        raise CannotWrite(f"it was changed since its export ({error})", path=out, hint=hint) from error
    if manifest is None:
        raise CannotWrite("pmm did not export this file, and does not replace it", path=out, hint=hint)
    if manifest.checkpoint_sha256 == sha256(checkpoint) and not _has_options(
        manifest, open_source(checkpoint), options
    ):
        raise CannotWrite(f"another export of {manifest.source_name}", path=out, hint=f"build from that file, {hint}")


def describe_export(artifact: Artifact) -> str:
    """One line: file, precision, size, and how it compared with the checkpoint."""
    manifest, size = artifact.manifest, artifact.path.stat().st_size / 1e6
    shares = ", ".join(f"{share:.2%} {name}" for name, share in manifest.precision_share.items())
    line = f"{artifact.path}: {manifest.precision_found} ({shares} of {manifest.macs / 1e9:.2f} GMAC), "
    line += f"batch {manifest.input.batch}, " if manifest.input.batch else ""
    line += f"opset {manifest.opset}, {size:.1f} MB, "
    for fallback in ("fp16", "fp32"):
        if kept := (manifest.quantization or {}).get(f"kept_in_{fallback}"):
            line += f"kept in {fallback}: {', '.join(kept)}; "
    if manifest.parity is None:
        return line + "parity NOT verified (--no-verify)"
    rows, cosine, centred = (manifest.parity[key] for key in ("rows", "min_cosine", "centred_min_cosine"))
    line += f"parity with {manifest.source_name} on {rows} crops: min cosine {cosine:.7f} "
    return line + f"({centred:.7f} without the mean row), norms within {manifest.parity['max_norm_error']:.2%}"


def _build(
    source: ExportSource,
    options: ExportOptions,
    calibration: Crops | None,
    parity_check: ParityCheck | None,
    name: str,
) -> tuple[onnx.ModelProto, dict[str, Any] | None]:
    """The graph of `options`, and `Manifest.quantization` of it; `calibration`: the crops for int8."""
    if calibration is not None:
        return quantize_graph(source, options, calibration, parity_check, name)
    proto = source.graph(options)
    if source.method == "adopted" and options.precision in ("fp16", "bf16"):
        size, contract = source.fed(options), source.input(options)
        try:
            proto, kept = half_with_fallback(proto, options.precision, parity_check, contract, size, name)
        except InvalidFile as error:
            error.path = error.path or source.path
            raise
        return proto, {"kept_in_fp32": kept} if kept else None
    return proto, None


def _verify(
    parity_check: ParityCheck, path: Path, proto: onnx.ModelProto, manifest: Manifest, name: str
) -> dict[str, Any]:
    """The parity figures of the written file: as ONNX Runtime runs it and, for half precision, more strictly."""
    precision, parity = manifest.precision, {}
    if precision != "bf16":  # which ONNX Runtime does not run on a CPU
        with OrtRunner(path, warn=False) as runner:
            parity = parity_check.check(runner, precision, name, runner.info.provider)
    if half := half_type(manifest):
        candidate = in_memory(emulated(proto), manifest.input, manifest.preprocessing, optimise=False)
        parity = parity_check.check(candidate, precision, name, f"fp32 arithmetic, every tensor rounded to {half}")
    return parity


def _has_options(manifest: Manifest, source: ExportSource, options: ExportOptions) -> bool:
    """Whether an export of this source has these options, by its manifest."""
    return (
        manifest.precision == options.precision
        and (source.adopted is not None or manifest.opset == options.onnx_opset)
        and manifest.input == source.input(options)
        and manifest.preprocessing == source.fed(options)
        and manifest.embedding == source.embedding(options)
        and (options.precision != "int8" or is_quantized_so(manifest.quantization or {}, options))
    )


def _versions(source: ExportSource) -> dict[str, str]:
    import onnx
    import onnxruntime

    return {**source.versions(), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
