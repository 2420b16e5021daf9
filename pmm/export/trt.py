"""Checkpoint or ONNX file -> engine, with TensorRT 10, 11 or TensorRT-RTX, each step proved.

The network is strongly typed: its precision is the file's, and is read back from the parsed network before the build
and, where the engine can be opened, from the engine. Loads torch for a checkpoint only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pmm.artifacts.artifact import Artifact, ArtifactDraft, manifest_path, new_artifact, remove_selftest
from pmm.artifacts.kinds import ENGINE_SUFFIXES, require_kind
from pmm.artifacts.manifest import Manifest
from pmm.artifacts.native_contracts import EngineContract
from pmm.artifacts.onnx_file import ADOPT, OnnxFile, read_onnx
from pmm.export.build_log import build_log
from pmm.export.cached import reusable
from pmm.export.engine_build import EngineBuild, build_network, check_options
from pmm.export.engine_precision import inspected
from pmm.export.options import EngineOptions, ExportOptions, VerifyOptions, check_file_precision
from pmm.export.parity_check import ParityCheck
from pmm.export.precision import GraphPrecision
from pmm.export.reference import engine_parity_check
from pmm.export.selftest import add_selftest, onnx_vectors
from pmm.runtime.driver import current_gpu
from pmm.runtime.trt_variant import FLAVORS, TF32_ON, gpu_for, gpu_here, library_name, load_flavor, this_platform
from pmm.selftest.vectors import SelftestVectors
from pmm.utils.errors import BackendUnavailable, InvalidFile, MissingLibrary
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import RTX_CAPABILITIES, Gpu, cuda_index, driver_version

Flavor = Literal["tensorrt", "rtx"]


def choose_flavor(flavor: Literal[Flavor, "auto"], onnx_file: Path, device: str = "auto") -> tuple[Flavor, Any]:
    """The builder to use and its module. "auto" is TensorRT where it is installed and a GPU is visible, else
    TensorRT-RTX, unless the GPU that `device` names does not run its engines.

    Raises BackendUnavailable saying what to install and where the ONNX file is, if there is no builder.
    """
    gpu = gpu_here(device)
    if flavor == "tensorrt" and not gpu:
        raise BackendUnavailable(
            "TensorRT builds engines only on a machine with an NVIDIA GPU, and none is visible",
            hint=f"use --flavor rtx, or build the engine on such a machine from {onnx_file}",
        )
    both: tuple[Flavor, ...] = ("tensorrt", "rtx") if gpu else ("rtx",)
    missing = []
    for name in both if flavor == "auto" else (flavor,):
        try:
            module = load_flavor(name)
        except MissingLibrary as error:
            missing.append(error)
            continue
        if flavor == "auto" and gpu and not gpu_for(name, device):
            raise BackendUnavailable(
                f"{gpu.name} (compute capability {gpu.compute_capability}) does not run TensorRT-RTX engines, and "
                f"{missing[0].problem}",
                hint=f"{missing[0].hint}; or build one for other GPUs ({', '.join(RTX_CAPABILITIES)}) with "
                f"--flavor rtx; the ONNX file is {onnx_file}",
            )
        for failure in missing:
            if find_spec(failure.library):  # installed but broken, which the user may not know
                logging.getLogger("pmm").warning("%s; %s builds the engine instead", failure, library_name(name))
        return name, module
    problems, hints = ([getattr(error, fact) for error in missing] for fact in ("problem", "hint"))
    raise BackendUnavailable(
        f"no library that builds engines: {', and '.join(problems)}",
        hint=f"{', or '.join(hints)}; the ONNX file is {onnx_file}",
    )


def build_engine(
    model: str | Path,
    out: str | Path,
    options: EngineOptions | None = None,
    *,
    export_options: ExportOptions | None = None,
    verification: VerifyOptions | None = None,
    exported: Callable[[Artifact], None] | None = None,
) -> Artifact:
    """Build the engine `out` (.plan) from a checkpoint or an ONNX file. A checkpoint is first exported to a verified
    ONNX file beside `out`; so is an adopted ONNX file for an engine in another precision than its own.

    TensorRT builds on a machine with an NVIDIA GPU only; TensorRT-RTX builds anywhere, and its engines run on GPUs of
    compute capability 7.5 and more. Where a GPU runs the engine, its embeddings of real crops are compared with the
    checkpoint's before it gets its name.

    Args:
        model: a checkpoint, or an ONNX file of `pmm.export_onnx` or pmm adopt (then no torch is needed).
        options: batch sizes, builder, GPU.
        export_options: precision and inputs of the ONNX file to export; of a `model` that is one, its precision.
        verification: the crops to compare on (default: test crops of the data set that the checkpoint names).
        exported: called with the ONNX file that was exported on the way, before the engine is built.

    Raises:
        InvalidFile: crops or files are missing, or the engine computes in another precision.
        ParityFailed: the embeddings moved; no engine is left.
        BackendUnavailable: no builder for this machine.

    Examples:
        >>> artifact = pmm.build_engine("best.onnx", "best.plan", pmm.EngineOptions(batch=((1, 8, 64),), flavor="rtx"))
        >>> artifact.manifest.precision_found
        'fp32'
    """
    options, verification = options or EngineOptions(), verification or VerifyOptions()
    path = Path(model)
    target = output_file(Path(out), path, suffixes=ENGINE_SUFFIXES)
    source = (
        path if require_kind(path, "checkpoint", "onnx") == "checkpoint" or _exports(path, export_options) else None
    )
    onnx = path
    if source:
        onnx = output_file(target.with_suffix(".onnx"), path)
        artifact = _onnx(source, onnx, export_options or ExportOptions(), verification)
        if exported:
            exported(artifact)
    file = read_onnx(onnx)
    if file.stored_manifest is None:
        hint = f"{ADOPT}, or build an engine that is not verified with --no-manifest"
        raise InvalidFile("an ONNX file without a manifest", path=onnx, hint=hint)
    if export_options:
        check_file_precision(onnx, file.manifest.precision, export_options.precision)
    options = dataclasses.replace(options, flavor=choose_flavor(options.flavor, onnx, options.device)[0])
    parity_check = engine_parity_check(file, source, verification, options.flavor, options.device)
    return engine_from_onnx(file, target, options, parity_check=parity_check)


def engine_from_onnx(
    file: OnnxFile, out: Path, options: EngineOptions | None = None, *, parity_check: ParityCheck | None = None
) -> Artifact:
    """Build an engine from an exported ONNX file and write its manifest.

    Args:
        parity_check: crops and expected embeddings; the engine must pass it, where a GPU here runs it.

    Raises:
        BackendUnavailable: no builder.
        InvalidFile: the parser refuses the file, or computes in another precision.
        ParityFailed: the embeddings moved; no engine is left.
        UserError: the builder fails.
    """
    options, source = options or EngineOptions(), file.manifest
    if (source.quantization or {}).get("target", "tensorrt") != "tensorrt":
        hint = "pmm export onnx --precision int8 --target tensorrt"
        raise InvalidFile("quantised for CPUs", path=file.path, expected="a file for TensorRT", hint=hint)
    flavor, trt = choose_flavor(options.flavor, file.path, options.device)
    check_options(trt, flavor, options, gpu_here(options.device))
    with build_log(out, show=options.verbose) as log, _current(options.device) as gpu:
        build = build_network(trt, flavor, file, options, log, gpu=gpu, precision=source.precision)
        manifest = _manifest(source, file, build, flavor, str(trt.__version__), options, gpu)
        with new_artifact(out, manifest) as draft:
            draft.path.write_bytes(build.engine)
            vectors = onnx_vectors(file)
            if gpu_for(flavor, options.device):
                with draft.openable():
                    _prove(draft, vectors, parity_check, options.device, log.write)
            else:
                add_selftest(draft, vectors)
    return Artifact(out, draft.manifest)


def build_engine_cached(
    file: OnnxFile, out: Path, options: EngineOptions, source: Path, verification: VerifyOptions
) -> Artifact:
    """`out` if it is what `engine_from_onnx` would build here from `file` (`pmm.export.cached.reusable`), else a new
    engine, verified against `source` where a GPU here runs it. `options` must name the flavor."""
    trt, gpu = load_flavor(options.flavor), gpu_here(options.device)

    def is_same(manifest: Manifest) -> bool:
        engine = manifest.engine
        if engine is None or engine.hardware_compatibility != options.hardware_compatibility:
            return False
        wanted = (file.sha256, str(trt.__version__), gpu.name if gpu else "", driver_version(), options.profiles)
        found = (engine.onnx_sha256, engine.version, engine.gpu, engine.driver, engine.batch)
        return found == wanted and (TF32_ON in engine.flags) == options.tf32

    verified = not verification.no_verify and gpu_for(options.flavor, options.device) is not None
    if cached := reusable(out, is_same, verified=verified, built_from=file):
        return cached
    parity_check = engine_parity_check(file, source, verification, options.flavor, options.device)
    return engine_from_onnx(file, out, options, parity_check=parity_check)


def build_foreign_engine(file: OnnxFile, out: Path, options: EngineOptions) -> tuple[str, GraphPrecision]:
    """Build an engine from an ONNX file that pmm did not export: without a manifest, so that no runner opens it.

    Returns the builder's name and version, and the engine's precision. Raises as `engine_from_onnx`.
    """
    flavor, trt = choose_flavor(options.flavor, file.path, options.device)
    check_options(trt, flavor, options, gpu_here(options.device))
    with build_log(out, show=options.verbose) as log, _current(options.device) as gpu:
        build = build_network(trt, flavor, file, options, log, gpu=gpu)
    write_file(out, build.engine)
    manifest_path(out).unlink(missing_ok=True)  # of an earlier engine
    remove_selftest(out)
    return f"{flavor} {trt.__version__}", build.precision


def _exports(path: Path, export_options: ExportOptions | None) -> bool:
    """Whether an engine of the ONNX file at `path` needs another file in between: an adopted one has its own precision
    only."""
    manifest = read_onnx(path).stored_manifest
    if manifest is None or export_options is None:
        return False
    return manifest.is_adopted_itself and export_options.precision != manifest.precision


def _onnx(checkpoint: Path, out: Path, export_options: ExportOptions, verification: VerifyOptions) -> Artifact:
    from pmm.export.onnx import check_overwrite, export_onnx, export_onnx_cached

    check_overwrite(out, checkpoint, export_options)
    # a cached file was verified on the crops of the checkpoint
    usual_crops = verification in (VerifyOptions(), VerifyOptions(no_verify=True))
    return (export_onnx_cached if usual_crops else export_onnx)(checkpoint, out, export_options, verification)


@contextlib.contextmanager
def _current(device: str) -> Iterator[Gpu | None]:
    """The GPU that `device` names, made this thread's current one, for which builders build."""
    index, gpu = cuda_index(device), gpu_here(device)
    with current_gpu(index) if index is not None else contextlib.nullcontext():
        yield gpu


def _prove(
    draft: ArtifactDraft,
    vectors: SelftestVectors | None,
    parity_check: ParityCheck | None,
    device: str,
    log: Callable[[str, str], None],
) -> None:
    """Give the draft what can only be known where the engine runs: its inspected precision and its embeddings."""
    from pmm.runtime.trt import TrtRunner

    manifest, name = draft.manifest, str(draft.out)
    with TrtRunner(draft.path, device, warn=False, log=log) as runner:
        engine = manifest.engine
        assert engine is not None
        if inspected(runner.inspect()).confirms(manifest.precision, name, tf32=TF32_ON in engine.flags):
            engine = dataclasses.replace(engine, precision_read_from="parsed network and engine inspector")
        precision = "tf32" if runner.info.precision == "tf32" else manifest.precision
        best = [profile.best for profile in engine.batch.profiles]  # each has other kernels
        parity = parity_check.check(runner, precision, name, runner.info.provider, best) if parity_check else None
        add_selftest(draft, vectors, runner)
    draft.manifest = dataclasses.replace(manifest, engine=engine, parity=parity)


def _manifest(
    source: Manifest,
    file: OnnxFile,
    build: EngineBuild,
    flavor: Flavor,
    version: str,
    options: EngineOptions,
    gpu: Gpu | None,
) -> Manifest:
    engine = EngineContract(
        flavor=flavor,
        version=version,
        batch=build.batch,
        onnx_sha256=file.sha256,
        platform=this_platform(),
        gpu=gpu.name if gpu else "",
        compute_capability=gpu.compute_capability if gpu else "",
        hardware_compatibility=options.hardware_compatibility,
        driver=driver_version(),
        flags=build.flags,
        precision_read_from="parsed network",
    )
    # the ONNX file's parity figures are not the engine's: those are measured where it runs
    return dataclasses.replace(
        source,
        checkpoint_sha256=source.source_sha256(file.sha256),
        precision_found=build.precision.precision,
        precision_share=build.precision.share,
        parity=None,
        engine=engine,
        versions={**source.versions, FLAVORS[flavor]: version},
    )
