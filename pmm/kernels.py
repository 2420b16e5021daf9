"""The compiled kernels of the mix (cpp_ext/): where they lie and what they were built with. Loads no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("_C.so")
_FACTS = re.compile(rb"pmm kernels built (\{[^\0]*\})\0")


def build_info() -> dict[str, Any]:
    """`compiled` (bool) and, of compiled kernels, `compiler`, `cuda` (toolkit version or None), `architectures` (GPU
    compute capabilities) and `sources` (the first digits of the sources' SHA-256)."""
    try:
        found = _FACTS.search(LIBRARY.read_bytes())
    except OSError:
        found = None
    return {"compiled": True, **json.loads(found[1])} if found else {"compiled": False}


def describe_build(facts: dict[str, Any] | None = None) -> str:
    """One line for people: which kernels the mix runs on; `facts` as `build_info` gives them (default: those here)."""
    facts = build_info() if facts is None else facts
    if not facts["compiled"]:
        return "plain torch (the kernels are not compiled)"
    gpu = f"CUDA {facts['cuda']} for {' '.join(facts['architectures'])}" if facts["cuda"] else "no CUDA"
    return f"compiled ({facts['compiler']}; {gpu}; sources {facts['sources']})"


def build_version() -> str:
    """As a version among those of libraries: sources, compiler and CUDA toolkit; "none" without compiled kernels."""
    facts = build_info()
    if not facts["compiled"]:
        return "none"
    return f"{facts['sources']}, {facts['compiler']}, {'CUDA ' + facts['cuda'] if facts['cuda'] else 'no CUDA'}"


def not_built(device: str) -> str | None:
    """Why no kernels are built for a type of device ("cpu", "cuda"); None if some are."""
    facts = build_info()
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for {device}"
    if not facts["compiled"]:
        return "the kernels are not compiled; run make setup, or pip install --no-build-isolation -e ."
    if device == "cuda" and not facts["cuda"]:
        return "the kernels were built without CUDA; rebuild with PMM_BUILD_CUDA=1"
    return None
