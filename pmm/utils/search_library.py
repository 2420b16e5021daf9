"""The compiled part of search and evaluation (cpp_ext/search/), which needs no torch: called through ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import numpy.typing as npt

from pmm.utils.build_info import SEARCH_LIBRARY, search_build_info


@cache
def library() -> Any | None:
    """The compiled library; None where it is missing, of other sources, or does not load.

    Raises RuntimeError instead of returning None under PMM_REQUIRE_EXT=1.
    """
    facts, reason = search_build_info(), ""
    if facts["compiled"]:
        try:
            found = ctypes.CDLL(str(SEARCH_LIBRARY))
            for name in ("scan", "half_distances", "within"):
                found[f"pmm_search_{name}"].restype = ctypes.c_int64
            found.pmm_search_ranks.restype = ctypes.c_bool
            return found
        except OSError as error:
            reason = f"the search kernel does not load ({error})"
    if os.environ.get("PMM_REQUIRE_EXT") == "1":
        stale = "of other sources" if facts.get("stale") else "not compiled"
        raise RuntimeError(f"PMM_REQUIRE_EXT=1, but {reason or f'the search kernel is {stale}'}")
    return None


def paths() -> list[str | None]:
    """The instruction sets that there is code for, the best first; None for one that this processor lacks."""
    kernel = library()
    if kernel is None:
        return []
    names = (ctypes.c_char_p * 8)()
    count = kernel.pmm_search_paths(names)
    return [name.decode() if name else None for name in names[:count]]


def address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    """Where the array's first number lies."""
    return ctypes.c_void_p(array.ctypes.data)
