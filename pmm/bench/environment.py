"""What a figure was measured on: a number without a machine is decoration."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pmm.machine import nvidia_gpus, usable_cores

LIBRARIES = (
    "torch", "torchvision", "numpy", "pillow", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime",
    "tensorrt", "tensorrt-rtx", "openvino",
)  # fmt: skip


def describe_environment(threads: int) -> dict[str, Any]:
    """CPU, cores, GPUs, operating system, library versions and the commit of this code, as plain values."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": threads,
        "gpus": list(nvidia_gpus()),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short commit of the source tree this package lies in, "+" if files differ from it; None if installed alone."""
    here = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
