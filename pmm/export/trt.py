"""ONNX file -> engine, with TensorRT 10, 11 or TensorRT-RTX: one Python API, the module is a parameter ("flavor").

The network is strongly typed: its precision is the file's, and is read back from the parsed network before the build
and, where the engine can be opened, from the engine. Loads no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pmm.artifacts.artifact import Artifact, drafted, manifest_path
from pmm.artifacts.manifest import BatchProfiles, EngineContract, Manifest
from pmm.artifacts.onnx_file import OnnxFile
from pmm.export.build_log import build_log
from pmm.export.engine_build import Built, build, check_options
from pmm.export.engine_precision import inspected
from pmm.export.options import EngineOptions
from pmm.export.parity_check import ParityCheck
from pmm.export.precision import Found
from pmm.runtime.driver import current_gpu
from pmm.runtime.trt_variant import (
    FLAVORS,
    RTX_CAPABILITIES,
    TF32_ON,
    gpu_for,
    gpu_here,
    library_name,
    load_flavor,
    this_platform,
)
from pmm.utils.errors import UserError
from pmm.utils.files import write_file
from pmm.utils.hardware import Gpu, cuda_index, driver_version

Flavor = Literal["tensorrt", "rtx"]


def choose_flavor(flavor: Literal[Flavor, "auto"], onnx_file: Path, device: str = "auto") -> tuple[Flavor, Any]:
    """The builder to use and its module. "auto" is TensorRT where it and a GPU are there, else TensorRT-RTX, unless the
    GPU that `device` names does not run its engines.

    Raises UserError saying what to install and where the ONNX file is, if there is none.
    """
    found = gpu_here(device)
    if flavor == "tensorrt" and not found:
        raise UserError(
            "TensorRT builds engines only on a machine with an NVIDIA GPU, and none is visible here; use --flavor rtx, "
            f"or build there from {onnx_file}"
        )
    either: tuple[Flavor, ...] = ("tensorrt", "rtx") if found else ("rtx",)
    missing = []
    for name in either if flavor == "auto" else (flavor,):
        try:
            module = load_flavor(name)
        except UserError as error:
            missing.append((name, str(error)))
            continue
        if flavor == "auto" and found and not gpu_for(name, device):
            raise UserError(
                f"{found.name} (compute capability {found.compute_capability}) does not run TensorRT-RTX engines, and "
                f"{missing[0][1]}; --flavor rtx builds one for other GPUs ({', '.join(RTX_CAPABILITIES)}); the ONNX "
                f"file is {onnx_file}"
            )
        for other, why in missing:
            if find_spec(FLAVORS[other]):  # installed, and broken: else nobody expects it
                logging.getLogger("pmm").warning("%s; %s builds the engine instead", why, library_name(name))
        return name, module
    raise UserError(f"no engine builder here: {', or '.join(why for _, why in missing)}; the ONNX file is {onnx_file}")


def engine_from_onnx(
    file: OnnxFile, out: Path, options: EngineOptions | None = None, *, gate: ParityCheck | None = None
) -> Artifact:
    """Build an engine from an exported ONNX file and write its manifest.

    Args:
        gate: crops and expected embeddings; the engine must pass it, where there is a GPU that runs it.

    Raises:
        UserError: no builder, a file that the parser or the builder refuses, another precision than the file's, or
            embeddings that moved (then no engine is left).
    """
    options, source = options or EngineOptions(), file.manifest
    if (source.quantization or {}).get("target", "tensorrt") != "tensorrt":
        raise UserError(f"{file.path}: quantised for CPUs; TensorRT wants another file: export with --target tensorrt")
    flavor, trt = choose_flavor(options.flavor, file.path, options.device)
    check_options(trt, flavor, options, gpu_here(options.device))
    with build_log(out, show=options.verbose) as log, _current(options.device) as gpu:
        built = build(trt, flavor, file, options, log, gpu=gpu, asked=source.precision)
        manifest = _manifest(source, file, built, flavor, str(trt.__version__), options, gpu)
        with drafted(out, manifest) as draft:
            draft.path.write_bytes(built.engine)
            if gpu_for(flavor, options.device):
                with draft.openable():
                    draft.manifest = _prove(draft.path, manifest, gate, str(out), options.device, log.write)
    return Artifact(out, draft.manifest)


def build_foreign_engine(file: OnnxFile, out: Path, options: EngineOptions) -> tuple[str, Found]:
    """Build an engine from an ONNX file that is not ours: no manifest, so no runner of ours opens it.

    Returns the builder's name and version, and the precision found. Raises UserError as `engine_from_onnx`.
    """
    flavor, trt = choose_flavor(options.flavor, file.path, options.device)
    check_options(trt, flavor, options, gpu_here(options.device))
    with build_log(out, show=options.verbose) as log, _current(options.device) as gpu:
        built = build(trt, flavor, file, options, log, gpu=gpu)
    write_file(out, built.engine)
    manifest_path(out).unlink(missing_ok=True)  # of an engine that was there before
    return f"{flavor} {trt.__version__}", built.found


def describe_engine(artifact: Artifact, device: str = "auto") -> str:
    """One line: builder, batch, precision and how it is known, size, GPU, parity. `device`: as it was built for."""
    manifest, engine = artifact.manifest, artifact.manifest.engine
    assert engine is not None
    share, here = manifest.precision_share[manifest.precision_found], gpu_for(engine.flavor, device)
    unconfirmed = here and engine.precision_read_from == "parsed network"
    silent = "; the engine inspector does not tell it" if unconfirmed else ""
    precision = manifest.precision_found + (" with TF32" if TF32_ON in engine.flags else "")
    line = (
        f"{artifact.path}: {engine.flavor} {engine.version} engine, {_sizes(engine.batch)}, {precision} ({share:.2%} "
        f"of the multiplications, read from the {engine.precision_read_from}{silent}), "
        f"{artifact.path.stat().st_size / 1e6:.1f} MB, built on {engine.gpu or 'a machine without a GPU'}, "
    )
    if manifest.parity is None:
        ran = "opened here, but " if here else "NOT run here: "
        return line + ran + "its embeddings are not verified"
    return line + f"parity on {manifest.parity['rows']} crops: min cosine {manifest.parity['min_cosine']:.7f}"


@contextlib.contextmanager
def _current(device: str) -> Iterator[Gpu | None]:
    """The GPU that `device` names, made the one that builders, which are told none, build for."""
    index, gpu = cuda_index(device), gpu_here(device)
    with current_gpu(index) if index is not None else contextlib.nullcontext():
        yield gpu


def _sizes(batch: BatchProfiles) -> str:
    if len(batch.profiles) > 1:
        return f"batch profiles {batch} (least, best, most)"
    return f"batch {batch.least} to {batch.most} (best {batch.best})"


def _prove(
    path: Path, manifest: Manifest, gate: ParityCheck | None, name: str, device: str, log: Callable[[str, str], None]
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
        parity = gate.check(runner, precision, name, runner.info.provider, best) if gate else None
    return dataclasses.replace(manifest, engine=engine, parity=parity)


def _manifest(
    source: Manifest, file: OnnxFile, built: Built, flavor: str, version: str, options: EngineOptions, gpu: Gpu | None
) -> Manifest:
    facts = {
        "flavor": flavor,
        "version": version,
        "batch": built.batch,
        "onnx_sha256": file.sha256,
        "platform": this_platform(),
        "gpu": gpu.name if gpu else "",
        "compute_capability": gpu.compute_capability if gpu else "",
        "hardware_compatibility": options.hardware_compatibility,
        "driver": driver_version(),
        "flags": built.flags,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()
    engine = EngineContract(**facts, precision_read_from="parsed network", key=key)  # type: ignore[arg-type]
    # the ONNX file's parity figures are not the engine's: those are measured where it runs
    return dataclasses.replace(
        source,
        precision_found=built.found.precision,
        precision_share=built.found.share,
        parity=None,
        engine=engine,
        versions={**source.versions, FLAVORS[flavor]: version},
    )
