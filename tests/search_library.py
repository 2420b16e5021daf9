"""The compiled library of the search and of ranks, as tests need it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pmm.evaluation.compiled import rank_kernel
from pmm.utils import build_info, search_library

WATCHED = "PMM_TEST_SEARCH_LIBRARY"
"""Names another build of the library (tests/slow/test_search_kernel.py)."""


def forget() -> None:
    """Look for the library anew."""
    search_library.library.cache_clear()
    rank_kernel.cache_clear()


@contextmanager
def required_library() -> Iterator[Any]:
    """The library, or that which WATCHED names; skips where there is neither one nor a compiler."""
    if not build_info.search_build_info()["compiled"] and not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    with pytest.MonkeyPatch.context() as patch:
        if WATCHED in os.environ:
            for module in (build_info, search_library):
                patch.setattr(module, "SEARCH_LIBRARY", Path(os.environ[WATCHED]))
        patch.setenv("PMM_REQUIRE_EXT", "1")
        forget()
        yield search_library.library()
    forget()
