"""Open a candidate's runner. Runs in a worker, which imports only the libraries of one backend."""

from __future__ import annotations

import time
from pathlib import Path

from pmm.runtime.base import Runner
from pmm.runtime.open import BACKENDS, RunOptions

MATRIX = 8192
"""Rows and columns of the square matrices whose product is timed."""


def open_candidate(
    artifact: Path, *, backend: str, precision: str, device: str, cuda_graph: bool | None, threads: int
) -> Runner:
    """The runner of one candidate. Raises UserError as the runners do."""
    # eager: the final kernels are timed, not those that TensorRT-RTX begins with
    options = RunOptions(
        device=device, threads=threads, precision=precision, cuda_graph=bool(cuda_graph), eager=True, warn=False
    )
    return BACKENDS[backend].open(artifact, options)


def matrix_tflops(device: str) -> dict[str, float]:
    """TFLOP/s of torch's product of two square matrices on the GPU `device`, per precision, as the rate that a
    network's is compared with. Median of 20 by the GPU's clock.
    """
    import statistics

    import torch

    from pmm.runtime.deployed_graph import TRUNK_TYPES

    torch.cuda.set_device(device)
    rates: dict[str, float] = {}
    for name in ("fp32", "tf32", "fp16", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a = torch.randn(MATRIX, MATRIX, device=device, dtype=TRUNK_TYPES[name])
        b = torch.randn(MATRIX, MATRIX, device=device, dtype=TRUNK_TYPES[name])
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 25 and time.perf_counter() - begin < 5:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            torch.mm(a, b)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        rates[name] = 2 * MATRIX**3 / (statistics.median(times[5:] or times) * 1e9)
    return rates
