"""What to install for a library that is missing. Loads nothing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from pmm.utils.hardware import driver_version

EXTRAS = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "openvino": "openvino",
    "pycuda": "pycuda",
    "cuda": "cuda-python",
    "faiss": "faiss-cpu",
}
"""Module -> package, of libraries that `pip install pmm-reid` leaves out."""
RENAMED = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "torch": "torch torchvision"}
"""Module -> package, where the name is another; torchvision has to fit torch."""
OURS = {"pmm", "bench", "export", "tests"}


def install_command(module: str) -> str:
    """The command that installs `module`, as `pip install openvino`."""
    if module == "tensorrt":  # its wheels are for one major version of CUDA each
        major = driver_version().partition(".")[0]
        return f"pip install tensorrt-cu{major}" if major in ("12", "13") else "pip install tensorrt"
    if module == "onnxruntime":
        return 'pip install onnxruntime (for NVIDIA GPUs "onnxruntime-gpu[cuda,cudnn]" in its place)'
    return f"pip install {EXTRAS.get(module) or RENAMED.get(module, module)}"


def missing_library(error: ImportError) -> str:
    """Which library is not installed and what to install, in one line; empty where `error` has another cause."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module in {"", *OURS, *sys.stdlib_module_names}:
        return ""
    if find_spec(module):  # it is there, and lacks a part
        return ""
    everything = "" if module in EXTRAS else "; pip install pmm-reid installs all that the package needs"
    return f"{module} is not installed: {install_command(module)}{everything}"
