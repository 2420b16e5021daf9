"""Checkpoint -> ONNX file with its manifest, proved against the checkpoint on real crops before it gets its name."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmm.artifacts.artifact import Artifact, beside, drafted, reusable
from pmm.artifacts.manifest import EmbeddingContract, Manifest
from pmm.artifacts.onnx_file import embed_manifest, is_onnx
from pmm.artifacts.runs import with_resolved_data_root
from pmm.config import Config
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Crops, preprocessing_of
from pmm.export.calibration import calibration_files
from pmm.export.emulate_half import emulated, half_type
from pmm.export.fallback import fp16_between
from pmm.export.int8 import BATCH, PROBES, Quantizer, quantised_until
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityCheck
from pmm.export.precision import found_precision
from pmm.export.reference import checkpoint_gate, in_memory
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import UserError
from pmm.utils.files import output_file, sha256

if TYPE_CHECKING:
    import onnx
    import torch


def export_onnx(
    checkpoint: str | Path,
    out: str | Path,
    recipe: ExportOptions | None = None,
    verification: VerifyOptions | None = None,
) -> Artifact:
    """Write the deployed graph of `checkpoint` to `out` as `recipe` says, and its manifest beside it.

    The batch is dynamic unless `recipe` has a static one, batch-norm is folded. The file gets its name only after its
    precision was read back from it and, unless told not to verify, its embeddings of real crops equalled the fp32
    checkpoint's.

    Raises:
        UserError: a bad checkpoint, no crops to verify or calibrate on, another precision in the file than asked for,
            or embeddings that moved (then no file is left).

    Example:
        >>> artifact = pmm.export_onnx("best.pth", "best-fp16.onnx", pmm.ExportOptions(precision="fp16"))
        >>> artifact.manifest.precision_found, artifact.manifest.parity["min_cosine"] > 0.999
        ('fp16', True)
    """
    checkpoint = Path(checkpoint)
    out = output_file(Path(out), checkpoint, suffixes=(".onnx",))
    recipe, verification = recipe or ExportOptions(), verification or VerifyOptions()

    from pmm.artifacts.checkpoint import load, restore_model

    digest = sha256(checkpoint)
    state = load(checkpoint)
    model, config = restore_model(state, checkpoint)
    config = with_resolved_data_root(config, checkpoint)
    # everything that can be refused is, before the work begins
    gate = checkpoint_gate(model, config, _embedding(model, recipe), verification)
    calibration = _calibration_crops(config, recipe) if recipe.precision == "int8" else None
    proto, quantization = _build(model, config, recipe, calibration, gate, str(out))
    found = found_precision(proto)
    found.check(recipe.precision, str(out))
    if sha256(checkpoint) != digest:
        raise UserError(f"{checkpoint} changed during the export (is it still being trained?); export it again")
    manifest = Manifest(
        checkpoint_sha256=digest,
        method=config.model.method,
        preprocessing=preprocessing_of(config),
        input=recipe.contract,
        embedding=_embedding(model, recipe),
        precision=recipe.precision,
        precision_found=found.precision,
        precision_share=found.share,
        macs=found.total,
        opset=recipe.onnx_opset,
        quantization=quantization,
        versions={**_versions(), "pmm kernels in training": state["versions"].get("pmm kernels", "unknown")},
    )
    with drafted(out, manifest) as draft:
        embed_manifest(proto, manifest)
        draft.path.write_bytes(proto.SerializeToString(deterministic=True))
        if gate:
            draft.manifest = dataclasses.replace(manifest, parity=_verify(gate, draft.path, proto, manifest, str(out)))
    return Artifact(out, draft.manifest)


def export_onnx_cached(
    checkpoint: Path, out: Path, recipe: ExportOptions | None = None, verification: VerifyOptions | None = None
) -> Artifact:
    """`out`, if it is whole, verified, and what `recipe` makes of this checkpoint; else exported by `export_onnx`."""
    recipe = recipe or ExportOptions()

    def fits(manifest: Manifest) -> bool:
        made = manifest.made_from(sha256(checkpoint), _versions()) and manifest.parity is not None
        # what a folder of crops holds now may be something else
        return made and not recipe.calibration_root and _as_asked(manifest, checkpoint, recipe)

    return reusable(out, fits) or export_onnx(checkpoint, out, recipe, verification)


def check_overwrite(out: Path, checkpoint: Path, recipe: ExportOptions) -> None:
    """Raise UserError if `out`, a name that nobody gave, is a file that is not ours, or another export of `checkpoint`:
    the user's, and not to be replaced in passing."""
    if not out.is_file():
        return
    advice = "give -o another name, or move it away"
    try:
        manifest = beside(out)
    except UserError as error:
        if not is_onnx(out):
            return  # a damaged file is made anew
        raise UserError(f"{out} is there, and was changed since it was exported ({error}); {advice}") from error
    if manifest is None:
        raise UserError(f"{out} is there, and no export of ours; {advice}")
    if manifest.checkpoint_sha256 == sha256(checkpoint) and not _as_asked(manifest, checkpoint, recipe):
        raise UserError(f"{out} is another export of this checkpoint; build from that file, or {advice}")


def describe(artifact: Artifact) -> str:
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
    line += (
        f"parity with the checkpoint on {rows} crops: min cosine {cosine:.7f} ({centred:.7f} without the mean row), "
    )
    return line + f"lengths within {manifest.parity['max_length_error']:.2%}"


def _build(
    model: torch.nn.Module,
    config: Config,
    recipe: ExportOptions,
    calibration: Crops | None,
    gate: ParityCheck | None,
    name: str,
) -> tuple[onnx.ModelProto, dict[str, Any] | None]:
    """The graph that `recipe` asks for and, for int8, how it was quantised."""
    from pmm.export.graph import to_onnx
    from pmm.runtime.deployed_graph import deployed_graph

    size, contract = preprocessing_of(config), recipe.contract
    graph = deployed_graph(model, size, contract, _embedding(model, recipe), recipe.precision)
    proto = to_onnx(graph, size, contract, recipe.onnx_opset)
    if calibration is None:
        return proto, None
    batch, crops = contract.batch or BATCH, calibration
    if contract.batch:  # filled up with crops that are there already: the extremes stay what they are
        crops = np.resize(crops, (-(-len(crops) // batch) * batch, *crops.shape[1:]))
    feeds = [contract.feed(crops[k : k + batch], size) for k in range(0, len(crops), batch)]
    quantizer = Quantizer(proto, recipe.target, feeds, contract.name)

    def finished(candidate: onnx.ModelProto) -> onnx.ModelProto:
        return fp16_between(candidate) if recipe.int8_fallback == "fp16" else candidate

    def passes(candidate: onnx.ModelProto) -> None:
        if gate:
            gate.check(in_memory(finished(candidate), contract, size), recipe.precision, name, "ONNX Runtime")

    quantised, kept = quantised_until(quantizer, passes, feeds[: max(1, PROBES // batch)])
    pixels = hashlib.sha256(calibration.tobytes()).hexdigest()
    return finished(quantised), {
        "target": recipe.target,
        "fallback": recipe.int8_fallback,
        "calibration": {
            "of": _calibrated_on(recipe),
            "asked": recipe.calibration_images,
            "images": len(calibration),
            "pixels_sha256": pixels,
            "method": "minmax",
        },
        f"kept_in_{recipe.int8_fallback}": kept,
    }


def _verify(gate: ParityCheck, path: Path, proto: onnx.ModelProto, manifest: Manifest, name: str) -> dict[str, Any]:
    """The gate's figures for the written file: as ONNX Runtime runs it and, for half precision, more strictly."""
    precision, parity = manifest.precision, {}
    if precision != "bf16":  # which ONNX Runtime does not run on a CPU
        with OrtRunner(path, warn=False) as runner:
            parity = gate.check(runner, precision, name, runner.info.provider)
    if half := half_type(manifest):
        candidate = in_memory(emulated(proto), manifest.input, manifest.preprocessing, optimise=False)
        parity = gate.check(candidate, precision, name, f"fp32 arithmetic, every tensor rounded to {half}")
    return parity


def _calibration_crops(config: Config, recipe: ExportOptions) -> Crops:
    root = recipe.calibration_root or config.data.root
    try:
        if not root:
            raise UserError("no data set is named")
        files = calibration_files(root, config.data.dataset, recipe.calibration_images)
    except UserError as error:
        if recipe.calibration_root:
            raise
        raise UserError(f"no crops to calibrate on ({error}); give --calibration-root DIR") from error
    return load_crops(files, config.data.height, config.data.width)


def _embedding(model: torch.nn.Module, recipe: ExportOptions) -> EmbeddingContract:
    return EmbeddingContract.of(model, normalised=recipe.normalize, flip_tta=recipe.flip_tta)


def _as_asked(manifest: Manifest, checkpoint: Path, recipe: ExportOptions) -> bool:
    """Does the manifest of an export of this checkpoint say what `recipe` says?"""
    from pmm.artifacts.checkpoint import load_model

    return (
        manifest.precision == recipe.precision
        and manifest.opset == recipe.onnx_opset
        and manifest.input == recipe.contract
        and manifest.embedding == _embedding(load_model(checkpoint), recipe)
        and (recipe.precision != "int8" or _same_quantization(manifest.quantization or {}, recipe))
    )


def _same_quantization(quantization: dict[str, Any], recipe: ExportOptions) -> bool:
    calibration = quantization.get("calibration", {})
    found = *(quantization.get(key) for key in ("target", "fallback")), calibration.get("of"), calibration.get("asked")
    return found == (recipe.target, recipe.int8_fallback, _calibrated_on(recipe), recipe.calibration_images)


def _calibrated_on(recipe: ExportOptions) -> str:
    """No path: two exports of one checkpoint are byte-equal wherever the crops lie."""
    return "a folder that was given" if recipe.calibration_root else "the training set of the checkpoint"


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import onnxscript

    from pmm.artifacts.checkpoint import versions

    libraries = (onnx, onnxscript, onnxruntime)
    return {**versions(), **{library.__name__: library.__version__ for library in libraries}}
