"""OpenVINO, on the CPU. Needs no torch."""

from __future__ import annotations

import threading
from collections import Counter
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pmm.artifacts.manifest import Manifest
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.preprocessing import Crops
from pmm.runtime.base import BoundRun, Embeddings, Runner, RunnerInfo, in_runs, warn_if_unverified
from pmm.runtime.fork import around_forks, keep_for_ever
from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.extras import install_command
from pmm.utils.hardware import compute_threads, int8_overflows

PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
"""OpenVINO's names -> ours."""
FROM_FILE = {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}
"""Precision to run in -> the file it runs from: OpenVINO rounds to bf16 itself."""
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # for the layers that are not int8
_PRODUCTS = ("Convolution", "FullyConnected")


class OpenVinoRunner(Runner):
    """An exported ONNX file in OpenVINO. Each thread that calls it gets its own inference request."""

    def __init__(self, path: str | Path, threads: int = 0, *, precision: str | None = None, warn: bool = True) -> None:
        """Open `path`.

        Args:
            threads: CPU threads (0: as many as cores, or as a quota of CPU time allows).
            precision: fp32 or bf16, from an fp32 file, or int8, from an int8 file (default: the file's own).
            warn: about embeddings that were never verified.

        Raises:
            UserError: the file is not ours, was changed, cannot run here, or would run in another precision.
            BackendUnavailable: OpenVINO is missing, or the CPU has no bf16 instructions.
        """
        file = read_onnx(path)
        self._path, self.manifest = path, file.manifest
        precision = precision or self.manifest.precision_found
        _check_request(str(path), precision, self.manifest)
        openvino = _import()
        core = _core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            # asked for all the same, OpenVINO would go on in fp32
            raise BackendUnavailable(f"{path}: this CPU has no bf16 instructions (AVX512-BF16 or AMX); run it in fp32")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            # threads tied to their cores lose to whatever else runs there, and measured no faster
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_NUM_THREADS": threads or compute_threads(),
        }
        try:
            # from the bytes that were hashed: the file cannot change in between
            self._compiled = core.compile_model(core.read_model(file.content), "CPU", settings)
        except RuntimeError as error:
            raise UserError(f"{path}: OpenVINO cannot load it ({_reason(error)})") from error
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        _check_interface(self._compiled, self.manifest, str(path))
        if warn:
            warn_if_unverified(Path(path), self.manifest)
        self._requests = threading.local()
        self._tensor = openvino.Tensor
        # one run now: OpenVINO chooses the last kernels then, and its graph tells the sizes
        image = np.zeros((1, self.preprocessing.height, self.preprocessing.width, 3), np.uint8)
        self(image)
        macs = self.manifest.macs * (self.manifest.input.batch or 1)
        evidence = _evidence(self._compiled.get_runtime_model(), precision, macs, str(path))
        self.info = RunnerInfo(
            backend="openvino",
            device="cpu",
            precision=precision,
            provider=f"openvino {openvino.__version__.split('-')[0]} CPU ({evidence})",
        )

    def __call__(self, images: Crops) -> Embeddings:
        self.check(images)
        if not len(images):  # which OpenVINO refuses
            return np.empty((0, self.embedding.dim), np.float32)
        return in_runs(self._run, images, self.manifest.input.batch)

    def _run(self, images: Crops) -> Embeddings:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        request, given = self._requests.own, self._given(images)
        request.set_input_tensor(given)
        request.infer()
        return request.get_output_tensor().data.copy()

    def bind(self, images: Crops) -> BoundRun:
        """As `Runner.bind`. Raises UserError for no images, and for another number than a static batch."""
        self.check(images)
        if not len(images):
            raise UserError("cannot bind 0 images; OpenVINO takes 1 or more")
        self.manifest.input.check_batch(len(images), self._path)
        request, given = self._compiled.create_infer_request(), self._given(images.copy())

        def step() -> None:
            request.set_input_tensor(given)
            request.infer()

        return BoundRun(step)

    def _given(self, images: Crops) -> Any:
        """The tensor that the graph takes: on the images themselves where nothing is to convert.

        Keep it while a request runs on it; the request itself does not.
        """
        feed = self.manifest.input.feed(images, self.preprocessing)
        if not feed.flags.writeable:
            feed = feed.copy()  # OpenVINO shares no memory that is read-only
        return self._tensor(feed, shared_memory=True)


def _import() -> Any:
    try:
        import openvino
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it loads is not
        raise BackendUnavailable(
            f"OpenVINO is missing here ({_reason(error)}): {install_command('openvino')}"
        ) from error
    return openvino


@cache
def _core() -> Any:
    """OpenVINO's devices, opened once in a process and never closed.

    Its CPU device lends its thread a stack for signal handlers. When devices are closed in the order of their opening,
    or by another thread, a freed one stays in use, and the next Ctrl-C crashes the process.
    """
    return _import().Core()


def _end_idle_threads() -> None:
    """OpenVINO keeps the threads of models that are gone for those to come, and a child would wait for them for ever.
    Closing a device, which takes milliseconds, ends those that no model has."""
    if _core.cache_info().currsize:
        _import().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _keep_core() -> None:
    if _core.cache_info().currsize:
        keep_for_ever(_core())


around_forks(before=_end_idle_threads, in_child=_keep_core)


def _check_request(path: str, asked: str, manifest: Manifest) -> None:
    if asked not in FROM_FILE:
        raise UserError(f"{path}: cannot run in {asked}; OpenVINO runs {', '.join(FROM_FILE)} here")
    if manifest.precision_found != FROM_FILE[asked]:
        raise UserError(
            f"{path}: OpenVINO runs {asked} from a file in {FROM_FILE[asked]}, and this one holds "
            f"{manifest.precision_found}; export it with --precision {FROM_FILE[asked]}"
        )
    if asked == "int8" and (manifest.quantization or {}).get("target") == "tensorrt" and int8_overflows():
        raise UserError(
            f"{path}: quantised for TensorRT, with weights of 8 bits; this CPU has no VNNI, and OpenVINO's sums of "
            "them would overflow; export it with --target cpu"
        )


def _evidence(graph: Any, asked: str, macs: int, name: str) -> str:
    """How much of the compiled graph runs in the precision asked for, read back from the graph.

    Args:
        macs: multiply-accumulates of one image, or of a static batch, all of which must be found again.

    Raises:
        UserError: for int8 and bf16 not even half of them run so or, for fp32, not all.
    """
    found: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for layer in graph.get_ops():
        facts = layer.get_rt_info()
        kind = facts["layerType"].astype(str)
        if kind in _PRODUCTS:
            precision = PRECISIONS.get(facts["runtimePrecision"].astype(str), "another type")
            batch, _, *positions = layer.output(0).get_partial_shape()  # a linear layer has no positions
            sizes = (batch, *positions, *layer.input(1).get_partial_shape())
            found[precision] += prod(max(1, size.get_min_length()) for size in sizes)
            convolutions[precision] += kind == "Convolution"
    found["layers that it does not tell of"] = max(0, macs - found.total())
    if found[asked] < macs if asked == "fp32" else 2 * found[asked] <= macs:
        shares = ", ".join(f"{count / macs:.1%} in {kind}" for kind, count in found.most_common() if count)
        raise UserError(f"{name}: asked for {asked}, but OpenVINO does the multiplications {shares}")
    return f"{convolutions[asked]} of {convolutions.total()} convolutions in {asked}"


def _check_interface(compiled: Any, manifest: Manifest, name: str) -> None:
    """The graph takes and gives what the manifest promises."""
    ports = (*compiled.inputs, *compiled.outputs)
    found = {port.get_any_name(): [port.get_element_type().to_dtype().name, *_shape(port)] for port in ports}
    given, returned = manifest.input, manifest.embedding
    batch = str(given.batch or "any")
    promised = {
        given.name: [given.dtype, batch, *map(str, given.shape(manifest.preprocessing))],
        returned.name: [returned.dtype, batch, str(returned.dim)],
    }
    if found != promised:
        raise UserError(f"{name}: takes and gives {found}, its manifest promises {promised}")


def _shape(port: Any) -> list[str]:
    return ["any" if size.is_dynamic else size.to_string() for size in port.get_partial_shape()]


def _reason(error: Exception) -> str:
    """OpenVINO says first where in its source, then what."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Exception from", "Check "))]
    return ", ".join(telling)[:200] or type(error).__name__
