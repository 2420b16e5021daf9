"""A candidate's runner. Runs in a worker: only what the backend needs is imported."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.bench.candidates import BACKENDS
from pmm.runtime.base import Runner
from pmm.utils.errors import Unavailable

if TYPE_CHECKING:
    from pmm.export.options import Precision

MATRIX = 8192
"""Rows and columns of the square matrices whose product is timed."""


def preload(backend: str) -> None:
    """Import the backend's library, so that opening a file is timed without it. Raises Unavailable if it cannot."""
    try:
        importlib.import_module(BACKENDS[backend].library)
    except (ImportError, OSError) as error:
        raise Unavailable(f"{BACKENDS[backend].library} cannot be imported here ({error})") from error


def open_candidate(
    artifact: Path, *, backend: str, precision: str, device: str, cuda_graph: bool | None, threads: int
) -> Runner:
    """The runner of one candidate. Raises UserError as the runners do."""
    graph = bool(cuda_graph)
    if backend in ("torch", "torch-compile"):
        return _torch(artifact, backend == "torch-compile", precision, device, graph, threads)
    if backend == "aoti":
        from pmm.runtime.aoti import AotiRunner

        return AotiRunner(artifact, device, threads, cuda_graph=graph, warn=False)
    if backend in ("ort-cpu", "ort-cuda"):
        from pmm.runtime.ort import OrtRunner

        return OrtRunner(artifact, device, threads, tf32=precision == "tf32", cuda_graph=graph, warn=False)
    if backend == "openvino":
        from pmm.runtime.openvino import OvRunner

        return OvRunner(artifact, threads, precision=precision, warn=False)
    from pmm.runtime.trt import TrtRunner

    # eager: what is timed are the kernels that a service has in the end, not those that TensorRT-RTX begins with
    return TrtRunner(artifact, device, cuda_graph=graph, eager=True, warn=False)


def _torch(checkpoint: Path, compiled: bool, precision: str, device: str, graph: bool, threads: int) -> Runner:
    """The checkpoint as it is, in fp32 and tf32; compiled, in half precision or as a CUDA graph the deployed graph."""
    from pmm.artifacts.checkpoint import load, restore_model
    from pmm.data.preprocessing import preprocessing_of
    from pmm.runtime.eager import EagerRunner, torch_device

    model, config = restore_model(load(checkpoint), checkpoint)
    size, where = preprocessing_of(config), torch_device(device)
    if precision in ("fp32", "tf32") and not compiled and not graph:
        return EagerRunner(model, size, where, threads, tf32=precision == "tf32")

    from pmm.artifacts.manifest import EmbeddingContract, InputContract
    from pmm.export.graph import deployed_graph
    from pmm.runtime.torch_graph import GraphRunner

    stored: Precision = "fp32" if precision == "tf32" else precision  # type: ignore[assignment]
    module = deployed_graph(model, size, InputContract(), EmbeddingContract.of(model), stored)
    return GraphRunner(module, size, where, precision=precision, threads=threads, compiled=compiled, cuda_graph=graph)


def matrix_tflops(device: str) -> dict[str, float]:
    """Rate of torch's product of two square matrices on the GPU `device`, per precision, TFLOP/s.

    It is what a network's rate is a share of. Median of 20 by the GPU's own clock.
    """
    import statistics

    import torch

    torch.cuda.set_device(device)
    found = {}
    kinds: dict[str, Any] = {
        "fp32": torch.float32,
        "tf32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
    }
    for name, kind in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a = torch.randn(MATRIX, MATRIX, device=device, dtype=kind)
        b = torch.randn(MATRIX, MATRIX, device=device, dtype=kind)
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 25 and time.perf_counter() - begin < 5:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            torch.mm(a, b)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        found[name] = 2 * MATRIX**3 / (statistics.median(times[5:] or times) * 1e9)
    return found
