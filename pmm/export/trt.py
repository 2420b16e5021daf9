"""ONNX file -> engine, with TensorRT 10, 11 or TensorRT-RTX: one Python API, the module is a parameter ("flavor").

The network is strongly typed: its precision is the file's, and is read back from the parsed network before the build
and, where the engine can be opened, from the engine. Loads no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pmm.artifacts.artifact import Artifact, drafted, manifest_path
from pmm.artifacts.manifest import BatchProfiles, EngineContract, Manifest
from pmm.artifacts.onnx_file import OnnxFile
from pmm.export.build_log import build_log
from pmm.export.engine_build import EngineBuild, build_network, check_options
from pmm.export.engine_precision import inspected
from pmm.export.options import EngineOptions
from pmm.export.parity_check import ParityCheck
from pmm.export.precision import GraphPrecision
from pmm.runtime.driver import current_gpu
from pmm.runtime.trt_variant import (
    FLAVORS,
    TF32_ON,
    gpu_for,
    gpu_here,
    library_name,
    load_flavor,
    this_platform,
)
from pmm.utils.errors import BackendUnavailable, InvalidFile, MissingLibrary
from pmm.utils.files import write_file
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
    raise BackendUnavailable(
        f"no library that builds engines: {', or '.join(map(str, missing))}", hint=f"the ONNX file is {onnx_file}"
    )


def engine_from_onnx(
    file: OnnxFile, out: Path, options: EngineOptions | None = None, *, parity_check: ParityCheck | None = None
) -> Artifact:
    """Build an engine from an exported ONNX file and write its manifest.

    Args:
        parity_check: crops and expected embeddings; the engine must pass it, where there is a GPU that runs it.

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
        with drafted(out, manifest) as draft:
            draft.path.write_bytes(build.engine)
            if gpu_for(flavor, options.device):
                with draft.openable():
                    draft.manifest = _prove(draft.path, manifest, parity_check, str(out), options.device, log.write)
    return Artifact(out, draft.manifest)


def build_foreign_engine(file: OnnxFile, out: Path, options: EngineOptions) -> tuple[str, GraphPrecision]:
    """Build an engine from an ONNX file that is not ours: no manifest, so no runner of ours opens it.

    Returns the builder's name and version, and the engine's precision. Raises as `engine_from_onnx`.
    """
    flavor, trt = choose_flavor(options.flavor, file.path, options.device)
    check_options(trt, flavor, options, gpu_here(options.device))
    with build_log(out, show=options.verbose) as log, _current(options.device) as gpu:
        build = build_network(trt, flavor, file, options, log, gpu=gpu)
    write_file(out, build.engine)
    manifest_path(out).unlink(missing_ok=True)  # of an earlier engine
    return f"{flavor} {trt.__version__}", build.precision


def describe_engine(artifact: Artifact, device: str = "auto") -> str:
    """One line: builder, batch, precision and how it is known, size, GPU, parity. `device`: that of its options."""
    manifest, engine = artifact.manifest, artifact.manifest.engine
    assert engine is not None
    share, here = manifest.precision_share[manifest.precision_found], gpu_for(engine.flavor, device)
    unconfirmed = here and engine.precision_read_from == "parsed network"
    silent = "; the engine inspector does not show it" if unconfirmed else ""
    precision = manifest.precision_found + (" with TF32" if TF32_ON in engine.flags else "")
    line = (
        f"{artifact.path}: {engine.flavor} {engine.version} engine, {_sizes(engine.batch)}, {precision} ({share:.2%} "
        f"of its MACs, read from the {engine.precision_read_from}{silent}), "
        f"{artifact.path.stat().st_size / 1e6:.1f} MB, built on {engine.gpu or 'a machine without a GPU'}, "
    )
    if manifest.parity is None:
        return line + ("opened here, but " if here else "NOT run here: ") + "its embeddings are not verified"
    return line + f"parity on {manifest.parity['rows']} crops: min cosine {manifest.parity['min_cosine']:.7f}"


@contextlib.contextmanager
def _current(device: str) -> Iterator[Gpu | None]:
    """The GPU that `device` names, made this thread's current one, for which builders build."""
    index, gpu = cuda_index(device), gpu_here(device)
    with current_gpu(index) if index is not None else contextlib.nullcontext():
        yield gpu


def _sizes(batch: BatchProfiles) -> str:
    if len(batch.profiles) > 1:
        return f"batch profiles {batch} (least, best, most)"
    return f"batch {batch.least} to {batch.most} (best {batch.best})"


def _prove(
    path: Path,
    manifest: Manifest,
    parity_check: ParityCheck | None,
    name: str,
    device: str,
    log: Callable[[str, str], None],
) -> Manifest:
    """The manifest with what can only be known where the engine runs: its inspected precision and its embeddings."""
    from pmm.runtime.trt import TrtRunner

    with TrtRunner(path, device, warn=False, log=log) as runner:
        engine = manifest.engine
        assert engine is not None
        if inspected(runner.inspect()).confirms(manifest.precision, name, tf32=TF32_ON in engine.flags):
            engine = dataclasses.replace(engine, precision_read_from="parsed network and engine inspector")
        precision = "tf32" if runner.info.precision == "tf32" else manifest.precision
        best = [profile.best for profile in engine.batch.profiles]  # each has kernels of its own
        parity = parity_check.check(runner, precision, name, runner.info.provider, best) if parity_check else None
    return dataclasses.replace(manifest, engine=engine, parity=parity)


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
        precision_found=build.precision.precision,
        precision_share=build.precision.share,
        parity=None,
        engine=engine,
        versions={**source.versions, FLAVORS[flavor]: version},
    )
