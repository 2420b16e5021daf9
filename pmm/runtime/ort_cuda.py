"""Why ONNX Runtime does not run on a GPU, and what mends it. Its CUDA provider is a library of its own, loaded when a
session asks for it; where that fails, ONNX Runtime goes on on the CPU without a word."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import sys
from pathlib import Path
from typing import Any

from pmm.utils.cuda_versions import advice
from pmm.utils.errors import UserError
from pmm.utils.hardware import driver_version

CUDA = "CUDAExecutionProvider"
CUDA_FAILURE = re.compile(r"(?:CUDA|CUDNN|CUBLAS) failure \d|cuDNN is not available")
"""In the text of an error: CUDA, and not the file, is to blame."""


class CudaFailure(UserError):
    """A CUDA library refused to work for ONNX Runtime: an old driver, a cuDNN for another CUDA, a full GPU."""


def preload(ort: Any) -> None:
    """Find the CUDA libraries in the nvidia packages: the provider knows no place to look for them, and only a process
    that has imported torch has them already."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; `fell_back` says it
            ort.preload_dlls()


def fell_back(ort: Any, session: Any) -> str:
    """Where ONNX Runtime runs instead of on the GPU, the reason of the system's loader, and what to do; empty if it
    runs there."""
    first = session.get_providers()[0]
    if first == CUDA:
        return ""
    said = ""
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    try:  # only now: loaded before ONNX Runtime does it, the library would not find its host
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as error:
        said = f" ({error})"
    version = getattr(ort, "cuda_version", "") or ""
    return (
        f"ONNX Runtime fell back to {first}{said}; this one is built for CUDA {version or 'of another version'} and "
        f"cuDNN 9, the driver serves CUDA {driver_version() or 'of no version'}"
        + (mend(ort, said) or ': pip install "onnxruntime-gpu[cuda,cudnn]"')
    )


def mend(ort: Any, said: str) -> str:
    """What to install where the loader, or ONNX Runtime, said this: cuDNN if that is missing (some releases link it,
    others load it when it is used), else what fits the driver and torch; empty if that is not known."""
    if said.lstrip(" (").lower().startswith(("libcudnn", "cudnn")) and " failure " not in said:
        major = str(getattr(ort, "cuda_version", "") or 13).partition(".")[0]
        return f"; no cuDNN 9 is here: pip install nvidia-cudnn-cu{major}"
    return advice("onnxruntime-gpu")
