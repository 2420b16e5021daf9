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
from pmm.runtime.base import BoundRun, Embeddings, Runner, RunnerInfo, run_in_batches, warn_if_unverified
from pmm.runtime.fork import around_forks, never_free
from pmm.utils.errors import BackendUnavailable, InvalidFile, InvalidValue, UserError, one_of
from pmm.utils.extras import import_library
from pmm.utils.hardware import compute_threads, int8_overflows

PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
"""OpenVINO's name -> the name here."""
FROM_FILE = {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}
"""Precision to run in -> the file it runs from: OpenVINO rounds to bf16 itself."""
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # for the layers that are not int8
_PRODUCTS = ("Convolution", "FullyConnected")


class OpenVinoRunner(Runner):
    """An exported ONNX file in OpenVINO. Each thread that calls it gets its own inference request."""

    _path: Path

    def __init__(self, path: str | Path, threads: int = 0, *, precision: str | None = None, warn: bool = True) -> None:
        """Open `path`.

        Args:
            threads: CPU threads (0: as many as cores, or as a quota of CPU time allows).
            precision: fp32 or bf16, from an fp32 file, or int8, from an int8 file (default: the file's own).
            warn: about embeddings that were never verified.

        Raises:
            InvalidFile: the file is not one of pmm export onnx, was changed, or is in another precision.
            BackendUnavailable: OpenVINO is missing, or the CPU has no bf16 instructions.
            UserError: OpenVINO computes in another precision.
        """
        file = read_onnx(path)
        self._path, self.manifest = Path(path), file.manifest
        precision = precision or self.manifest.precision_found
        _check_precision(self._path, precision, self.manifest)
        openvino = import_library("openvino")
        core = shared_core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            # OpenVINO would silently run in fp32
            problem = "this CPU has no bf16 instructions (AVX512-BF16 or AMX)"
            raise BackendUnavailable(problem, path=path, hint="run it in fp32")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            # threads tied to cores lose to other processes on them, and measured no faster
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_NUM_THREADS": threads or compute_threads(),
        }
        try:
            # from the bytes that were hashed: the file cannot change in between
            self._compiled = core.compile_model(core.read_model(file.content), "CPU", settings)
        except RuntimeError as error:
            raise InvalidFile(f"OpenVINO cannot load it ({_reason(error)})", path=path) from error
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        self.method = self.manifest.method
        _check_interface(self._compiled, self.manifest, str(path))
        if warn:
            warn_if_unverified(Path(path), self.manifest)
        self._requests = threading.local()
        self._tensor = openvino.Tensor
        # one run now: OpenVINO chooses the last kernels then, and its graph has sizes afterwards
        image = np.zeros((1, self.preprocessing.height, self.preprocessing.width, 3), np.uint8)
        self(image)
        macs = self.manifest.macs * (self.manifest.input.batch or 1)
        evidence = _verify_precision(self._compiled.get_runtime_model(), precision, macs, self._path)
        self.info = RunnerInfo(
            backend="openvino",
            device="cpu",
            precision=precision,
            provider=f"openvino {openvino.__version__.split('-')[0]} CPU ({evidence})",
        )

    def _embed(self, images: Crops) -> Embeddings:  # type: ignore[override]
        if not len(images):  # which OpenVINO refuses
            return np.empty((0, self.embedding.dim), np.float32)
        return run_in_batches(self._run, images, self.manifest.input.batch)

    def _run(self, images: Crops) -> Embeddings:
        if not hasattr(self._requests, "request"):
            self._requests.request = self._compiled.create_infer_request()
        request, tensor = self._requests.request, self._input_tensor(images)
        request.set_input_tensor(tensor)
        request.infer()
        return request.get_output_tensor().data.copy()

    def _bind(self, images: Crops) -> BoundRun:
        self.manifest.input.check_batch(len(images), self._path)
        request, tensor = self._compiled.create_infer_request(), self._input_tensor(images.copy())

        def step() -> None:
            request.set_input_tensor(tensor)
            request.infer()

        return BoundRun(step)

    def _input_tensor(self, images: Crops) -> Any:
        """The tensor that the graph takes: it shares the images' memory where nothing is to convert.

        Keep a reference while a request runs on it; the request has none.
        """
        feed = self.manifest.input.feed(images, self.preprocessing)
        if not feed.flags.writeable:
            feed = feed.copy()  # OpenVINO shares no memory that is read-only
        return self._tensor(feed, shared_memory=True)


@cache
def shared_core() -> Any:
    """OpenVINO's devices, opened once in a process and never closed.

    Its CPU device lends its thread a stack for signal handlers. When devices are closed in the order of their opening,
    or by another thread, a freed one stays in use, and the next Ctrl-C crashes the process.
    """
    return import_library("openvino").Core()


def _end_idle_threads() -> None:
    """OpenVINO keeps the threads of models that are gone for those to come, and a child would wait for them for ever.
    Closing a device, which takes milliseconds, ends those that no model has."""
    if shared_core.cache_info().currsize:
        import_library("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _keep_core() -> None:
    if shared_core.cache_info().currsize:
        never_free(shared_core())


around_forks(before=_end_idle_threads, in_child=_keep_core)


def _check_precision(path: Path, precision: str, manifest: Manifest) -> None:
    """Raises InvalidValue or InvalidFile if the file cannot run in `precision` here."""
    if precision not in FROM_FILE:
        raise InvalidValue("precision", precision, f"{one_of(FROM_FILE)}, in which OpenVINO runs {path}")
    needed = FROM_FILE[precision]
    if manifest.precision_found != needed:
        expected = f"a file in {needed}" + (f", to run in {precision}" if needed != precision else "")
        hint = f"pmm export onnx --precision {needed}"
        raise InvalidFile(f"it is in {manifest.precision_found}", path=path, expected=expected, hint=hint)
    target = (manifest.quantization or {}).get("target")
    if target == "opencv":
        problem = "quantised for OpenCV, in operators (QLinearConv) that OpenVINO computes wrongly"
        raise InvalidFile(problem, path=path, hint="export it with --target cpu")
    if precision == "int8" and target == "tensorrt" and int8_overflows():
        problem = "quantised for TensorRT: the sums of its 8-bit weights overflow in OpenVINO on CPUs without VNNI"
        raise InvalidFile(problem, path=path, hint="export it with --target cpu")


def _verify_precision(graph: Any, precision: str, macs: int, path: Path) -> str:
    """How much of the compiled graph runs in `precision`, read back from the graph.

    Args:
        macs: multiply-accumulates of one image, or of a static batch, which must be the graph's.

    Raises:
        UserError: fewer than half of them run in int8 or bf16, or not all in fp32.
    """
    measured: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for layer in graph.get_ops():
        facts = layer.get_rt_info()
        kind = facts["layerType"].astype(str)
        if kind in _PRODUCTS:
            name = PRECISIONS.get(facts["runtimePrecision"].astype(str), "another type")
            batch, _, *positions = layer.output(0).get_partial_shape()  # a linear layer has no positions
            sizes = (batch, *positions, *layer.input(1).get_partial_shape())
            measured[name] += prod(max(1, size.get_min_length()) for size in sizes)
            convolutions[name] += kind == "Convolution"
    measured["layers that it does not show"] = max(0, macs - measured.total())
    if measured[precision] < macs if precision == "fp32" else 2 * measured[precision] <= macs:
        shares = ", ".join(
            f"{count / macs:.1%} in {kind}" for kind, count in measured.most_common() if count and kind != precision
        )
        problem = f"OpenVINO runs only {measured[precision] / macs:.1%} of its MACs in {precision} ({shares})"
        expected = f"{'all' if precision == 'fp32' else 'more than half'} in {precision}"
        raise UserError(problem, path=path, expected=expected)
    return f"{convolutions[precision]} of {convolutions.total()} convolutions in {precision}"


def _check_interface(compiled: Any, manifest: Manifest, name: str) -> None:
    """Raises InvalidFile if the graph's inputs and outputs are not those of the manifest."""
    ports = (*compiled.inputs, *compiled.outputs)
    actual = {port.get_any_name(): [port.get_element_type().to_dtype().name, *_shape(port)] for port in ports}
    images, embeddings = manifest.input, manifest.embedding
    batch = str(images.batch or "any")
    declared = {
        images.name: [images.dtype, batch, *map(str, images.shape(manifest.preprocessing))],
        embeddings.name: [embeddings.dtype, batch, str(embeddings.dim)],
    }
    if actual != declared:
        raise InvalidFile(f"its inputs and outputs are {actual}", path=name, expected=f"{declared}, by its manifest")


def _shape(port: Any) -> list[str]:
    return ["any" if size.is_dynamic else size.to_string() for size in port.get_partial_shape()]


def _reason(error: Exception) -> str:
    """Without the lines that name a place in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(("Exception from", "Check "))]
    return ", ".join(reasons)[:200] or type(error).__name__
