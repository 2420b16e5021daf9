"""ONNX file -> engine, with TensorRT 10, 11 or TensorRT-RTX: one Python API, the module is a parameter ("flavor").

The network is strongly typed: its precision is the file's, and is read back from the parsed network before the build
and, where the engine can be opened, from the engine. Loads no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pmm import cli
from pmm.errors import Unavailable, UserError
from pmm.export.engine_precision import inspected, network_precision
from pmm.export.gate import Gate
from pmm.export.precision import Found
from pmm.export.recipe import EngineOptions
from pmm.files import output_file, write_file
from pmm.machine import driver_version, nvidia_gpus
from pmm.manifest import Artifact, BatchProfiles, EngineContract, Manifest, drafted, manifest_path
from pmm.onnx_file import OnnxFile
from pmm.runtime.flavors import (
    FLAVORS,
    RTX_CAPABILITIES,
    error_logger,
    gpu_for,
    library_name,
    load_flavor,
    started,
    this_platform,
)
from pmm.runtime.tf32 import TF32_ON, has_tf32

Flavor = Literal["tensorrt", "rtx"]


def choose_flavor(flavor: Literal[Flavor, "auto"], onnx_file: Path) -> tuple[Flavor, Any]:
    """The builder to use and its module. "auto" is TensorRT where it and a GPU are there, else TensorRT-RTX, unless the
    GPU here does not run its engines.

    Raises UserError saying what to install and where the ONNX file is, if there is none.
    """
    found = bool(nvidia_gpus())
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
        if flavor == "auto" and found and not gpu_for(name):
            gpu = nvidia_gpus()[0]
            raise UserError(
                f"{gpu.name} (compute capability {gpu.compute_capability}) does not run TensorRT-RTX engines, and "
                f"{missing[0][1]}; --flavor rtx builds one for other GPUs ({', '.join(RTX_CAPABILITIES)}); the ONNX "
                f"file is {onnx_file}"
            )
        for other, why in missing:
            if find_spec(FLAVORS[other]):  # installed, and broken: else nobody expects it
                print(f"warning: {why}; {library_name(name)} builds the engine instead", file=sys.stderr)
        return name, module
    raise UserError(f"no engine builder here: {', or '.join(why for _, why in missing)}; the ONNX file is {onnx_file}")


def build_engine(
    file: OnnxFile, out: Path, options: EngineOptions | None = None, *, gate: Gate | None = None
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
    flavor, trt = choose_flavor(options.flavor, file.path)
    built = _build(trt, flavor, file, options)
    built.found.check(source.precision, f"{file.path}: as {flavor} parsed it")
    manifest = _manifest(source, file, built, flavor, str(trt.__version__), options)
    with drafted(out, manifest) as draft:
        draft.path.write_bytes(built.engine)
        if gpu_for(flavor):
            # the engine's file is opened as a user's would be, so it needs its manifest for the moment
            beside = manifest_path(draft.path)
            try:
                beside.write_text(
                    dataclasses.replace(manifest, sha256=hashlib.sha256(built.engine).hexdigest()).to_json()
                )
                draft.manifest = _prove(draft.path, manifest, gate, str(out))
            finally:
                beside.unlink(missing_ok=True)
    return Artifact(out, draft.manifest)


def build_foreign_engine(file: OnnxFile, out: Path, options: EngineOptions) -> tuple[str, Found]:
    """Build an engine from an ONNX file that is not ours: no manifest, so no runner of ours opens it.

    Returns the builder's name and version, and the precision found. Raises UserError as `build_engine`.
    """
    flavor, trt = choose_flavor(options.flavor, file.path)
    built = _build(trt, flavor, file, options)
    write_file(out, built.engine)
    manifest_path(out).unlink(missing_ok=True)  # of an engine that was there before
    return f"{flavor} {trt.__version__}", built.found


def describe_engine(artifact: Artifact) -> str:
    """One line: builder, batch, precision and how it is known, size, GPU, parity."""
    manifest, engine = artifact.manifest, artifact.manifest.engine
    assert engine is not None
    share, here = manifest.precision_share[manifest.precision_found], gpu_for(engine.flavor)
    unconfirmed = here and engine.precision_read_from == "parsed network"
    silent = "; the engine inspector does not tell it" if unconfirmed else ""
    precision = manifest.precision_found + (" with TF32" if TF32_ON in engine.flags else "")
    line = (
        f"{artifact.path}: {engine.flavor} {engine.version} engine, batch {engine.batch.least} to {engine.batch.most} "
        f"(best {engine.batch.best}), {precision} ({share:.2%} of the multiplications, read from the "
        f"{engine.precision_read_from}{silent}), {artifact.path.stat().st_size / 1e6:.1f} MB, "
        f"built on {engine.gpu or 'a machine without a GPU'}, "
    )
    if manifest.parity is None:
        ran = "opened here, but " if here else "NOT run here: "
        return line + ran + "its embeddings are not verified"
    return line + f"parity on {manifest.parity['rows']} crops: min cosine {manifest.parity['min_cosine']:.7f}"


@dataclasses.dataclass(frozen=True)
class _Built:
    engine: bytes
    found: Found
    flags: tuple[str, ...]


def _build(trt: Any, flavor: str, file: OnnxFile, options: EngineOptions) -> _Built:
    name = f"{flavor} {trt.__version__}"
    logger = error_logger(trt)
    builder = started(trt.Builder, logger, f"{file.path}: {name}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # from the bytes that were hashed, unless weights lie in files beside it, which only the path finds
    parsed = parser.parse(file.content) if not file.external else parser.parse_from_file(str(file.path))
    if not parsed:
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        said = " ".join((reasons or logger.take()).split())
        raise UserError(f"{file.path}: {name} does not parse it ({said[:300]})")
    found = network_precision(trt, network)
    if options.tf32:
        _check_tf32(file.path, found)

    config = builder.create_builder_config()
    profile = _set_profile(builder, network, config, options, f"{file.path}: {name}")
    # TF32 is on by default in TensorRT; an fp32 engine must be fp32
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector; costs nothing at run time
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, max(1, int(options.workspace * 2**30)))
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.hardware_compatible and flavor == "tensorrt":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    with _timing_cache(config, options.timing_cache, name), cli.deferred_interrupt() as release:
        with _progress(trt, config, release):
            engine = builder.build_serialized_network(network, config)
        release()
        if engine is None:
            raise UserError(f"{file.path}: {name} built no engine ({logger.take()})")
    return _Built(bytes(engine), found, (*profile, *_flags(trt, config)))


def _check_tf32(path: Path, found: Found) -> None:
    if found.precision != "fp32":
        raise UserError(f"{path}: --tf32 is for the products of an fp32 file, and this one holds {found.precision}")
    if nvidia_gpus() and not has_tf32(nvidia_gpus()[0]):
        raise Unavailable(f"{path}: --tf32: {nvidia_gpus()[0].name} has no TF32; build without it")


def _flags(trt: Any, config: Any) -> Iterator[str]:
    """What shapes the build, read back from the configuration."""
    yield TF32_ON if config.get_flag(trt.BuilderFlag.TF32) else "TF32 off"
    yield f"workspace {config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) / 2**30:.3g} GiB"
    yield f"optimization level {config.builder_optimization_level}"
    yield f"hardware compatibility {str(config.hardware_compatibility_level).rpartition('.')[2]}"


def _set_profile(builder: Any, network: Any, config: Any, options: EngineOptions, name: str) -> list[str]:
    """One optimisation profile over the batch for every input, and how it reads back.

    Raises UserError for other dynamic dimensions.
    """
    profile, batch, set_to = builder.create_optimization_profile(), options.profile, []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        image = tuple(tensor.shape)[1:]
        if not tensor.shape or tensor.shape[0] != -1 or min(image, default=1) < 1:
            raise UserError(f"{name}: input {tensor.name} is {tuple(tensor.shape)}; only the batch may be dynamic")
        profile.set_shape(tensor.name, *[(size, *image) for size in (batch.least, batch.best, batch.most)])
        set_to.append(f"{tensor.name}: batch {' '.join(str(shape[0]) for shape in profile.get_shape(tensor.name))}")
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"{name} refuses the batch profile {batch.least} {batch.best} {batch.most}")
    return set_to


@contextlib.contextmanager
def _timing_cache(config: Any, path: Path | None, name: str) -> Iterator[None]:
    """Measured kernel times of earlier builds, read from `path` if it is there, and written back."""
    if path is None:
        yield
        return
    output_file(path)  # before minutes of building
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise UserError(f"{path}: not a timing cache of {name} on this GPU; remove it or give another --timing-cache")
    yield
    filled = config.get_timing_cache()
    if filled is not None:
        write_file(path, bytes(filled.serialize()))


@contextlib.contextmanager
def _progress(trt: Any, config: Any, release: Callable[[], None]) -> Iterator[None]:
    """A progress bar over the phases of the build, which may take many minutes, and a way out: Ctrl-C ends it.

    An exception does not get through the library, so `release`, which raises a Ctrl-C that was held back, is only
    asked here; the caller calls it again.
    """
    from tqdm import tqdm

    with tqdm(desc="building the engine", unit="step", leave=False, disable=None) as bar:

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                bar.total = (bar.total or 0) + num_steps
                bar.set_postfix_str(phase_name, refresh=True)

            def phase_finish(self, phase_name: str) -> None:
                bar.refresh()

            def step_complete(self, phase_name: str, step: int) -> bool:
                bar.update()
                try:
                    release()
                except KeyboardInterrupt:
                    return False
                return True

        monitor = Monitor()
        config.progress_monitor = monitor
        yield


def _prove(path: Path, manifest: Manifest, gate: Gate | None, name: str) -> Manifest:
    """The manifest with what can only be known where the engine runs: its inspected precision and its embeddings."""
    from pmm.runtime.trt import TrtRunner

    with TrtRunner(path, warn=False) as runner:
        engine = manifest.engine
        assert engine is not None
        if inspected(runner.inspect()).confirms(manifest.precision, name, tf32=TF32_ON in engine.flags):
            engine = dataclasses.replace(engine, precision_read_from="parsed network and engine inspector")
        precision = "tf32" if runner.info.precision == "tf32" else manifest.precision
        parity = gate.check(runner, precision, name, runner.info.provider) if gate else None
    return dataclasses.replace(manifest, engine=engine, parity=parity)


def _manifest(
    source: Manifest, file: OnnxFile, built: _Built, flavor: str, version: str, options: EngineOptions
) -> Manifest:
    gpu = nvidia_gpus()[0] if nvidia_gpus() else None
    facts = {
        "flavor": flavor,
        "version": version,
        "batch": BatchProfiles((options.profile,)),
        "onnx_sha256": file.sha256,
        "platform": this_platform(),
        "gpu": gpu.name if gpu else "",
        "compute_capability": gpu.compute_capability if gpu else "",
        # a TensorRT-RTX engine is compiled for the GPU it meets
        "hardware_compatible": options.hardware_compatible or flavor == "rtx",
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
