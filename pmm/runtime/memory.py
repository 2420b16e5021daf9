"""Out-of-memory errors of all libraries as one line; each library has its own exceptions and wording."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from pmm.utils.errors import OutOfMemory, UserError, reason_of

_FULL = (
    "out of memory",
    "failed to allocate memory",
    "unable to allocate",
    "bad_alloc",
    "alloc_failed",
    "allocation_failed",
)
_CUDA_PART = re.compile(
    r"(?:(?:CUDA|CUDNN|CUBLAS) failure \d|Failed to allocate |cuDNN is not available).*?(?= ; GPU=|$)"
)


@contextlib.contextmanager
def batch_fits(images: Any) -> Iterator[None]:
    """Raises OutOfMemory where the memory, of a GPU or the host, is too small for a run of `images` [B, ...]."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not any(words in str(error).lower() for words in _FULL):
            raise
        count = (images.shape if hasattr(images, "shape") else images.__cuda_array_interface__["shape"])[0]
        raise OutOfMemory(
            f"{count} images at once need too much memory ({reason(error)})",
            hint="use a smaller --batch-size, or call the runner with fewer",
        ) from error


def reason(error: Exception) -> str:
    """The first line of a library's error, at most 200 characters. Of ONNX Runtime's errors on a GPU, without the
    C++ signatures before it and the host's name behind it."""
    return (_CUDA_PART.findall(str(error)) or [reason_of(error)])[0][:200]
