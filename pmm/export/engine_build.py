"""The calls of the builder: a parsed network, a configuration, the bytes of an engine. Loads no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmm.artifacts.batch_profiles import BatchProfile, BatchProfiles
from pmm.artifacts.onnx_file import OnnxFile
from pmm.export.build_log import BuildLog
from pmm.export.engine_precision import network_precision
from pmm.export.options import EngineOptions
from pmm.export.precision import GraphPrecision
from pmm.runtime.trt_variant import TF32_ON, Listener, error_logger, start
from pmm.utils import command_line
from pmm.utils.errors import BackendUnavailable, ConflictingOptions, InvalidFile, InvalidValue, OutOfMemory, UserError
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import Gpu


@dataclass(frozen=True)
class EngineBuild:
    """An engine, and what went into it."""

    engine: bytes
    precision: GraphPrecision
    """Of the parsed network."""
    batch: BatchProfiles
    flags: tuple[str, ...]


def build_network(
    trt: Any,
    flavor: str,
    file: OnnxFile,
    options: EngineOptions,
    log: BuildLog,
    *,
    gpu: Gpu | None = None,
    precision: str | None = None,
) -> EngineBuild:
    """Build `file` with the module `trt` of `flavor`, for options that `check_options` lets pass.

    Args:
        log: gets all messages of the builder.
        gpu: the one that the builder measures on, if there is one; this thread's current GPU.
        precision: that the network must have; None for any.

    Raises:
        InvalidFile: the library does not parse the file, or the file does not have that precision or batch.
        ConflictingOptions: the options do not fit the file.
        BackendUnavailable: no TF32 on this GPU.
        UserError: the library built no engine.
    """
    name, logger = f"{file.path}: {flavor} {trt.__version__}", error_logger(trt, log.write)
    builder = start(trt.Builder, logger, name)
    # always so from TensorRT 11 on, which ignores the flag
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger.native)  # holds the weights until the engine is built
    _parse(parser, file, f"{flavor} {trt.__version__}", logger)
    parsed_precision = network_precision(trt, network, file.path)
    if precision:
        kept = file.manifest.keeps_layers
        parsed_precision.check(precision, file.path, f"the network that {flavor} parsed", kept=kept)
    if options.tf32:
        _check_tf32(file.path, parsed_precision, gpu)
    config = builder.create_builder_config()
    batch, profiles = _set_profiles(builder, network, config, options, name, file.path)
    _set_options(trt, config, options)
    with _timing_cache(config, options.timing_cache, name), command_line.deferred_interrupt() as release:
        with _progress(trt, config, release, show=not options.verbose):
            engine = builder.build_serialized_network(network, config)
        release()
        if engine is None:
            raise _refused(name, logger, log.serious, options, batch)
    return EngineBuild(bytes(engine), parsed_precision, batch, (*profiles, *_flags(trt, config, options)))


def _parse(parser: Any, file: OnnxFile, library: str, logger: Listener) -> None:
    """Raises InvalidFile, with the reasons of `library`, if it does not parse the file."""
    # from the bytes that were hashed, unless weights are in other files, which are found by the path
    parsed = parser.parse(file.content) if not file.external else parser.parse_from_file(str(file.path))
    if not parsed:
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        reason = " ".join((reasons or logger.take()).split())
        raise InvalidFile(f"{library} does not parse it ({reason[:300]})", path=file.path)


def _set_options(trt: Any, config: Any, options: EngineOptions) -> None:
    # TF32 is on by default in TensorRT; an fp32 engine must be fp32
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector; costs nothing at run time
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, max(1, int(options.workspace * 2**30)))
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.hardware_compatibility != "none":  # TensorRT-RTX has neither the setter nor the getter
        config.hardware_compatibility_level = _level(trt, options)


def check_options(trt: Any, flavor: str, options: EngineOptions, gpu: Gpu | None) -> None:
    """Raises ConflictingOptions, InvalidValue or BackendUnavailable for what this library, version or GPU has not.

    Least compute capabilities: NvInfer.h, HardwareCompatibilityLevel.
    """
    name, word = f"{flavor} {trt.__version__}", options.hardware_compatibility
    if options.timing_cache is not None and flavor == "rtx":  # its operations are no-ops in TensorRT-RTX (pyCore.cpp)
        problem = f"--timing-cache is for TensorRT, and this is {name}, which measures no kernels when it builds"
        raise ConflictingOptions(problem, "--timing-cache", hint="leave the flag out")
    if word == "none":
        return
    flag = "--hardware-compatibility"
    if flavor == "rtx":
        problem = (
            f"{flag} {word} is for TensorRT, and this is {name}, which compiles its kernels on the GPU that runs them"
        )
        raise ConflictingOptions(problem, flag, hint="leave the flag out")
    if _level(trt, options) is None:
        raise InvalidValue(flag, word, f"none or ampere-plus: this is {name}, and TensorRT has {word} from 10.9 on")
    least = (8, 0) if word == "ampere-plus" else (7, 5)
    if gpu and tuple(map(int, gpu.compute_capability.split("."))) < least:
        raise BackendUnavailable(
            f"{flag} {word} with {name} needs a GPU of compute capability {least[0]}.{least[1]} or more to build on, "
            f"and {gpu.name} has {gpu.compute_capability}"
        )


def _level(trt: Any, options: EngineOptions) -> Any:
    """The member of HardwareCompatibilityLevel; None for one that this version does not have."""
    return getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.replace("-", "_").upper(), None)


def _check_tf32(path: Path, graph: GraphPrecision, gpu: Gpu | None) -> None:
    if graph.precision != "fp32":
        problem = f"--tf32 is for files in fp32, and {path} is in {graph.precision}"
        raise ConflictingOptions(problem, "--tf32", hint="leave the flag out")
    if gpu and not gpu.has_tf32:
        raise BackendUnavailable(f"--tf32: {gpu.name} has no TF32", path=path, hint="leave the flag out")


def _flags(trt: Any, config: Any, options: EngineOptions) -> Iterator[str]:
    """What shapes the build, read back from the configuration."""
    yield TF32_ON if config.get_flag(trt.BuilderFlag.TF32) else "TF32 off"
    yield f"workspace {config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) / 2**30:.3g} GiB"
    yield f"optimization level {config.builder_optimization_level}"
    if options.hardware_compatibility != "none":
        yield f"hardware compatibility {str(config.hardware_compatibility_level).rpartition('.')[2]}"


def _set_profiles(
    builder: Any, network: Any, config: Any, options: EngineOptions, name: str, path: Path
) -> tuple[BatchProfiles, list[str]]:
    """The optimisation profiles over the batch of every input, and as text, read back.

    Raises InvalidFile for other dynamic dimensions, ConflictingOptions for batches that are not those of a file of a
    static batch.
    """
    shapes = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    for tensor, shape in shapes.items():
        if not shape or min(shape[1:], default=1) < 1:
            raise InvalidFile(f"input {tensor} is {shape}", path=path, expected="fixed sizes, but for the batch")
    batch, texts = _batch(options, {shape[0] for shape in shapes.values()}, path), []
    for at, wanted in enumerate(batch.profiles):
        profile = builder.create_optimization_profile()
        for tensor, shape in shapes.items():
            profile.set_shape(tensor, *[(size, *shape[1:]) for size in (wanted.least, wanted.best, wanted.most)])
            sizes = " ".join(str(read_back[0]) for read_back in profile.get_shape(tensor))
            texts.append(f"{tensor}: batch {sizes}")
        if config.add_optimization_profile(profile) != at:
            raise UserError(f"{name} refuses the batch profile {wanted}")
    return batch, texts


def _batch(options: EngineOptions, first: set[int], path: Path) -> BatchProfiles:
    """The profiles of `options`; of a file of a static batch, that batch alone. `first`: first sizes of its inputs."""
    static = first - {-1}
    if not static:
        return options.profiles
    if len(first) > 1:
        sizes = ", ".join(map(str, sorted(first)))
        raise InvalidFile(f"its inputs have batches of {sizes}", path=path, expected="the same batch for all inputs")
    size = static.pop()
    try:
        only = BatchProfiles((BatchProfile(least=size, best=size, most=size),))
    except UserError as error:
        error.path = path
        raise
    if options.batch and options.profiles != only:
        raise ConflictingOptions(
            f"{path} has static batch {size}, and --batch is {options.profiles}",
            "--batch",
            hint="leave --batch out, or export the file without --static-batch",
        )
    return only


@contextlib.contextmanager
def _timing_cache(config: Any, path: Path | None, name: str) -> Iterator[None]:
    """Measured kernel times of earlier builds, read from `path` if it exists, and written back."""
    if path is None:
        yield
        return
    output_file(path)  # before minutes of building
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        hint = "remove it or give another --timing-cache"
        raise InvalidFile(f"not a timing cache of {name} on this GPU", path=path, hint=hint)
    yield
    filled = config.get_timing_cache()
    if filled is not None:
        write_file(path, bytes(filled.serialize()))


@contextlib.contextmanager
def _progress(trt: Any, config: Any, release: Callable[[], None], *, show: bool = True) -> Iterator[None]:
    """A progress bar over the phases of the build, which may take many minutes, and a way out: Ctrl-C ends it.

    An exception does not get through the library, so a Ctrl-C that `release` raises here only ends the build; the
    caller calls it again.
    """
    from tqdm import tqdm

    with tqdm(desc="building the engine", unit="step", leave=False, disable=None if show else True) as bar:

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


_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemory|could not be allocated|User allocator error|Device memory is insuff"
)
_NO_KERNEL = "Could not find any implementation"
_REQUESTED = re.compile(r"(?:Requested size was|GPU memory \(|error allocating|requested size of) ?(\d+)")


def _refused(
    name: str, logger: Listener, serious: list[str], options: EngineOptions, batch: BatchProfiles
) -> UserError:
    """For a build that gave nothing: the library's errors and, where it lacked memory, what to change.

    A lack of memory shows in warnings and errors of the allocators; the last error is then that a layer has no
    implementation ("Could not find any implementation for node ..."), which reads as if it were not supported. Kernels
    may lack memory in a build that fails for another reason, too.
    """
    lacked = [line for line in serious if _NO_MEMORY.search(line)]
    if lacked and (serious[-1] in lacked or any(_NO_KERNEL in line for line in serious)):
        sizes = [int(match[1]) for match in map(_REQUESTED.search, lacked) if match]
        largest = f"; one allocation was of {max(sizes) / 2**30:.2f} GiB" if sizes else ""
        logger.errors.insert(0, lacked[0])
        return OutOfMemory(
            f"{name} built no engine: out of GPU memory{largest} ({logger.take()})",
            hint="free memory on the GPU, give kernels less scratch with --workspace GIB, or build for less than "
            f"{batch.most} images (--batch)",
        )
    if options.workspace is not None and any("insufficient workspace" in line for line in serious):
        return UserError(
            f"{name} built no engine: --workspace {options.workspace} is too small for a kernel ({logger.take()})",
            hint="give more, or leave the flag out",
        )
    return UserError(f"{name} built no engine ({logger.take()})")
