"""Which CUDA each library is built for, as its files say and as the library itself says once it is loaded."""

from __future__ import annotations

import contextlib
from typing import Any

from pmm.utils.cuda_versions import misfits, side_by_side
from pmm.utils.errors import UserError


def cuda_majors() -> dict[str, Any]:
    """Library -> CUDA, what does not fit, and what ONNX Runtime and torch say themselves.

    Raises UserError if what the files say is not what a library says.
    """
    read, told = side_by_side(), _told()
    for name, version in told.items():
        if name in read and read[name].partition(".")[0] != version.partition(".")[0]:
            raise UserError(f"{name}'s files speak of CUDA {read[name]}, and the library of CUDA {version}")
    return {**read, "told by the library": told, "does not fit": [misfit.text for misfit in misfits()]}


def _told() -> dict[str, str]:
    found = {}
    with contextlib.suppress(ImportError):
        import torch

        found["torch"] = torch.version.cuda or "none"
    with contextlib.suppress(ImportError):
        import onnxruntime

        if version := getattr(onnxruntime, "cuda_version", ""):
            found["onnxruntime-gpu"] = str(version)
    return found
