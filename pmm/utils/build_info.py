"""The version of the package, and the builds of its compiled kernels (cpp_ext/): of the mix, and of the search, which
needs no torch. Loads none."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = PACKAGE / "_C.so"
SEARCH_LIBRARY = PACKAGE / "_search.so"
SOURCES = PACKAGE.parent / "cpp_ext"
"""Beside the package in a source tree; a wheel has none."""
TEGRA = ("5.3", "6.2", "7.2", "8.7", "10.1", "11.0")
"""GPUs of Jetson modules: machine code for another GPU does not run on them, nor theirs on another."""
_FACTS = re.compile(rb"pmm kernels built (\{[^\0]*\})\0")


def build_info() -> dict[str, Any]:
    """`compiled` (bool) and, of compiled kernels, `compiler`, `cuda` (toolkit version or None), `architectures` (GPU
    compute capabilities) and `sources` (the first digits of the sources' SHA-256).

    Kernels that were built from other sources than those beside the package do not count; `stale` is then true.
    """
    return _facts_of(LIBRARY, SOURCES, "kernels.h")


def search_build_info() -> dict[str, Any]:
    """As `build_info`, of the kernel of the search: `compiled`, `compiler` and `sources`."""
    return _facts_of(SEARCH_LIBRARY, SOURCES / "search", "search.h")


def _facts_of(library: Path, sources: Path, known: str) -> dict[str, Any]:
    """What a library embeds; `known`: a file that its sources have wherever they are."""
    try:
        match = _FACTS.search(library.read_bytes())
    except OSError:
        match = None
    facts = {"compiled": True, **json.loads(match[1])} if match else {"compiled": False}
    if match and (sources / known).exists() and facts["sources"] != sources_digest(sources):
        return {"compiled": False, "stale": True}
    return facts


def sources_digest(folder: Path) -> str:
    """The first digits of the SHA-256 of the sources in `folder`, but for those of the search in a folder of their own;
    what `build_info` calls `sources`."""
    digest = hashlib.sha256()
    sources = [path for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    for path in sorted(path for path in sources if path.relative_to(folder).parts[0] != "search"):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def describe_build(facts: dict[str, Any] | None = None) -> str:
    """One line: which kernels the mix runs on; `facts` as `build_info` gives them (default: of this installation)."""
    facts = build_info() if facts is None else facts
    if not facts["compiled"]:
        return f"plain torch (the kernels are {'of other sources' if facts.get('stale') else 'not compiled'})"
    gpu = f"CUDA {facts['cuda']} for {' '.join(facts['architectures'])}" if facts["cuda"] else "no CUDA"
    return f"compiled ({facts['compiler']}; {gpu}; sources {facts['sources']})"


def describe_search_build(facts: dict[str, Any] | None = None) -> str:
    """One line: what the search runs on; `facts` as `search_build_info` gives them (default: of this installation)."""
    facts = search_build_info() if facts is None else facts
    if not facts["compiled"]:
        return f"numpy (the kernel is {'of other sources' if facts.get('stale') else 'not compiled'})"
    return f"compiled ({facts['compiler']}; sources {facts['sources']})"


def build_version() -> str:
    """A version for a list of libraries: sources, compiler and CUDA toolkit; "none" without compiled kernels."""
    facts = build_info()
    if not facts["compiled"]:
        return "none"
    return f"{facts['sources']}, {facts['compiler']}, {'CUDA ' + facts['cuda'] if facts['cuda'] else 'no CUDA'}"


def runs_on(architecture: str, capability: str) -> bool:
    """Whether code for `architecture`, as setup.py lists them, runs on a GPU of that compute capability, both as 9.0.

    Machine code runs on the same and later minor versions of its major one (on Tegra: on its own), PTX on all later
    ones, by way of the driver's compiler; with the suffix "a" both run on that very version, with "f" on those of the
    same major one. (NVIDIA's CUDA Programming Guide, "Compute Capabilities"; torch.cuda compares its own code so.)
    """
    name, _, ptx = architecture.partition("+")
    code, gpu = (tuple(map(int, version.rstrip("af").split("."))) for version in (name, capability))
    if name.endswith("a"):
        return code == gpu
    if ptx and not name.endswith("f"):
        return gpu >= code
    alike = not {name.rstrip("f"), capability} & set(TEGRA)
    return code == gpu or (alike and code[0] == gpu[0] and code[1] < gpu[1])


def not_built_for(capability: str, driver: str) -> str | None:
    """Why kernels that are built with CUDA do not run on a GPU of that compute capability, with a driver that serves
    CUDA up to `driver` (both as 9.0); None if they do."""
    facts = build_info()
    built, served = (tuple(map(int, version.split(".")[:2])) for version in (facts["cuda"], driver))
    again = rebuild("pip install --no-build-isolation -e .")
    if built[0] > served[0]:
        return f"the kernels were built with CUDA {facts['cuda']}, and the driver serves CUDA {driver} at most; {again}"
    # older drivers of the same major version run machine code, and compile no newer PTX
    usable = [name if built <= served else name.partition("+")[0] for name in facts["architectures"]]
    if any(runs_on(name, capability) for name in usable):
        return None
    return f"the kernels were built for GPUs of {' '.join(facts['architectures'])}, not for {capability}; {again}"


def not_built(device: str) -> str | None:
    """Why no kernels are built for a type of device ("cpu", "cuda"); None if some are."""
    facts = build_info()
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for {device}"
    if facts.get("stale"):
        return f"the kernels were built from other sources than cpp_ext/ has now; {rebuild()}"
    if not facts["compiled"]:
        return f"the kernels are not compiled; {rebuild()}"
    if device == "cuda" and not facts["cuda"]:
        return "the kernels were built without CUDA; rebuild with PMM_BUILD_CUDA=1"
    return None


def rebuild(command: str = "make setup, or pip install --no-build-isolation -e .") -> str:
    """How: by `command` in a source tree."""
    return f"run {command}" if SOURCES.exists() else "run pip install --no-build-isolation . in a clone of pmm"
