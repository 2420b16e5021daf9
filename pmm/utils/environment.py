"""The machine and the software that a figure was measured with, for reports and bug reports.

Names no host, no user and no folder, so that it can be published.
"""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pmm.utils.build_info import __version__, build_info, not_built_for, search_build_info
from pmm.utils.cuda_versions import misfits, side_by_side
from pmm.utils.hardware import (
    clashing_wheels,
    driver_version,
    installed_version,
    nvidia_driver,
    nvidia_gpus,
    usable_cores,
)

LIBRARIES = (
    "torch", "torchvision", "numpy", "pillow", "simplejpeg", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime",
    "tensorrt", "tensorrt-rtx", "pycuda", "openvino", "faiss-cpu", "usearch",
)  # fmt: skip


def describe_environment(threads: int | None = None) -> dict[str, Any]:
    """CPU, cores, GPUs, operating system, library versions, compiled kernels and the commit of this code, as plain
    values.

    `threads`: CPU threads of the measurement, if it has a number of them.
    """
    return {
        "pmm": __version__,
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        **({} if threads is None else {"threads": threads}),
        "gpus": [gpu.name for gpu in nvidia_gpus()],
        "compute_capabilities": [gpu.compute_capability for gpu in nvidia_gpus()],
        "driver": nvidia_driver(),
        "driver_cuda": driver_version(),
        "cuda": side_by_side(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := installed_version(name))},
        "kernels": build_info(),
        "search_kernel": search_build_info(),
        "problems": problems(),
    }


def report_header(schema: str, threads: int | None = None) -> dict[str, Any]:
    """The first fields of a report of `schema`: the time, and `describe_environment`."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"schema": schema, "created": created, "environment": describe_environment(threads)}


def problems() -> list[str]:
    """Known problems of this machine's libraries, driver and compiled kernels."""
    clash = clashing_wheels()
    return [*([clash] if clash else []), *(misfit.text for misfit in misfits()), *_gpus_without_kernels()]


def _gpus_without_kernels() -> list[str]:
    """Of kernels that are built with CUDA: the GPUs that they do not run on, and why."""
    if not build_info().get("cuda"):
        return []
    reasons = {gpu.name: not_built_for(gpu.compute_capability, driver_version()) for gpu in nvidia_gpus()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name for files: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str | None:
    """Short commit of the source tree this package lies in, "+" if files differ from it; None if installed alone."""
    here = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
