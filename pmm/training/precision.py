"""The precision that steps compute in: what `--amp auto` means on a device, and what a device only emulates."""

from __future__ import annotations

import dataclasses
import time
from functools import cache

import torch

from pmm.config import Config
from pmm.training.distributed import SINGLE, Processes
from pmm.utils.errors import BackendUnavailable
from pmm.utils.hardware import Gpu, cpu_has_bf16

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SPEEDUP = 1.2
"""Of a CPU's products in bf16 over those in fp32, for "auto" to mean bf16."""
SIDE, PRODUCTS = 512, 5
"""Of the matrices that a CPU is tried with, and how often."""


def with_resolved_amp(config: Config, device: torch.device, processes: Processes = SINGLE) -> Config:
    """`config` with the precision that "auto" means on `device`: the fastest that the devices of all processes have.

    All processes call it. Raises BackendUnavailable for bf16 on a device that emulates it, and for fp16 on a CPU:
    both are slower than fp32.
    """
    amp: str = config.recipe.amp
    processes.run_on_all(lambda: _check_precision(amp, device))
    if amp == "auto":
        everywhere = processes.broadcast(processes.gather(_faster_than_fp32(device)))
        amp = next((half for half in HALF if all(half in of_one for of_one in everywhere)), "off")
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, amp=amp))  # type: ignore[arg-type]


def describe_precision(config: Config, device: torch.device) -> str:
    """What steps of `config`, whose precision is resolved, compute in on `device`, TF32 included."""
    amp = config.recipe.amp
    if amp in HALF:
        return f"{amp}, with a scaled loss" if amp == "fp16" else amp
    rounded = [
        what
        for what, allowed in (
            ("convolutions", torch.backends.cudnn.allow_tf32),
            ("matrix products", torch.backends.cuda.matmul.allow_tf32),
        )
        if allowed and device.type == "cuda" and _gpu(device).has_tf32
    ]
    return f"fp32, {' and '.join(rounded)} in TF32" if rounded else "fp32"


def reason_for(amp: str, device: torch.device, world: int = 1) -> str:
    """Why "auto" means `amp` on `device`, or on those of `world` processes."""
    name = _name(device) if world == 1 else "the slowest device of this run"
    if amp == "bf16":
        return f"{_name(device)} computes in bf16" if world == 1 else "all devices of this run compute in bf16"
    if amp == "fp16":
        return f"{name} computes in fp16 but not in bf16"
    if world == 1 and _has_bf16(device):
        return f"{name} computes in bf16, but at {bf16_speedup():.1f} times the speed of fp32"
    return f"{name} computes in no half precision"


@cache
def bf16_speedup() -> float:
    """How many times as fast as in fp32 this CPU multiplies in bf16, by its own time, which leaves other processes out.

    To have the instructions is not enough: those of AVX512-BF16 multiply twice as fast as fp32 on some CPUs, and half
    as fast on others, whose AMX a virtual machine may hide.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(before)


def _product_seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(PRODUCTS + 1):  # the first also prepares
        begin = time.thread_time()
        matrix @ matrix
        times.append(time.thread_time() - begin)
    return min(times)


def _check_precision(amp: str, device: torch.device) -> None:
    if amp == "bf16" and not _has_bf16(device):
        problem = f"--amp bf16: {_name(device)} does not compute in bf16, it would be emulated, slower than fp32"
        raise BackendUnavailable(problem, hint="use --amp auto")
    if amp == "fp16" and device.type == "cpu":
        raise BackendUnavailable("--amp fp16: on a CPU it is many times slower than fp32", hint="use --amp auto")


def _faster_than_fp32(device: torch.device) -> tuple[str, ...]:
    """The half precisions that `device` multiplies in faster than in fp32."""
    if device.type != "cuda":
        return ("bf16",) if cpu_has_bf16() and bf16_speedup() >= MIN_SPEEDUP else ()
    has = {"bf16": _gpu(device).has_bf16, "fp16": _gpu(device).has_fast_fp16}
    return tuple(half for half in HALF if has[half])


def _has_bf16(device: torch.device) -> bool:
    return _gpu(device).has_bf16 if device.type == "cuda" else cpu_has_bf16()


def _gpu(device: torch.device) -> Gpu:
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_name(device), f"{major}.{minor}")


def _name(device: torch.device) -> str:
    return _gpu(device).name if device.type == "cuda" else "this CPU"
