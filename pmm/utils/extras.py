"""Optional libraries: imported when they are needed, and what to install for one that is missing. Loads nothing."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

from pmm.utils.errors import MissingLibrary, reason_of
from pmm.utils.hardware import driver_version

EXTRAS = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "openvino": "openvino",
    "pycuda": "pycuda",
    "cuda": "cuda-python",
    "faiss": "faiss-cpu",
    "timm": "timm",
    "pymilvus": "pymilvus",
    "milvus_lite": "milvus-lite",
    "pyarrow": "pyarrow",
}
"""Module -> package, of the libraries that the package itself does not ask for."""
RENAMED = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "torch": "torch torchvision"}
"""Module -> package, where the names differ; torch and torchvision must fit each other."""
PROJECT = ("pmm", "bench", "export", "tests")


def import_library(module: str) -> Any:
    """The module of that name. Raises MissingLibrary with the reason and the command that installs it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it loads is not
        problem = f"{module} cannot be imported ({reason_of(error)})"
        raise MissingLibrary(module, problem, hint=install_command(module)) from error


def check_installed(*modules: str) -> None:
    """Before long work that will need them, and without importing them. Raises MissingLibrary for the first of
    `modules` that is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise MissingLibrary(module, f"{module} is not installed", hint=install_command(module))


def install_command(module: str) -> str:
    """The command that installs `module`, or what it is a part of, as `pip install openvino`."""
    module = module.partition(".")[0]
    if module == "tensorrt":  # its wheels are for one major version of CUDA each
        major = driver_version().partition(".")[0]
        return f"pip install tensorrt-cu{major}" if major in ("12", "13") else "pip install tensorrt"
    if module == "onnxruntime":
        return 'pip install onnxruntime, or for NVIDIA GPUs "onnxruntime-gpu[cuda,cudnn]" in its place'
    return f"pip install {EXTRAS.get(module) or RENAMED.get(module, module)}"


def missing_library(error: Exception) -> str:
    """Which library is missing and what to install, in one line; empty where `error` says of none.

    A module of Python or of this project that is missing is a bug.
    """
    name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    module = name.partition(".")[0]
    if not module or module in PROJECT or module in sys.stdlib_module_names:
        return ""
    if sys.modules.get(module) or find_spec(module):
        package = RENAMED.get(module, module)
        return f"the {module} that is installed has no {name}: pip install --upgrade {package}"
    everything = "" if module in EXTRAS else ", or pip install pmm-reid for all that the package can need"
    return f"{module} is not installed: {install_command(module)}{everything}"
