"""The compiled kernels beside the plain-torch references: loaded once, chosen by device.

`PMM_REQUIRE_EXT=1` makes it an error to run without them.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

import torch

from pmm.utils.build_info import LIBRARY, not_built, not_built_for
from pmm.utils.hardware import driver_version, nvidia_gpus


def kernels(device: torch.device) -> Any | None:
    """The namespace of the six kernels (cpp_ext/kernels.h) for `device`; None where they are not compiled.

    Raises RuntimeError instead of returning None under PMM_REQUIRE_EXT=1.
    """
    reason = missing(device)
    if reason is None:
        return torch.ops.pmm_kernels
    if os.environ.get("PMM_REQUIRE_EXT") == "1" and device.type in ("cpu", "cuda"):
        raise RuntimeError(f"PMM_REQUIRE_EXT=1, but {reason}")
    return None


@cache
def missing(device: torch.device) -> str | None:
    """Why there are no kernels for `device` (a GPU without an index: the current one): not built, not for this GPU or
    its driver, or not loaded; None if there are."""
    if reason := not_built(device.type):
        return reason
    if device.type == "cuda" and (gpus := nvidia_gpus()):
        index = torch.cuda.current_device() if device.index is None else device.index
        if reason := not_built_for(gpus[index].compute_capability, driver_version()):
            return reason
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        reason = f"the kernels do not load with torch {torch.__version__} ({error}); rebuild them"
        if os.environ.get("PMM_REQUIRE_EXT") != "1":
            warnings.warn(f"{reason}; going on with plain torch", stacklevel=2)
        return reason
    return None
