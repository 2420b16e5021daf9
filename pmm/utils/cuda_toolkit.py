"""The CUDA toolkit that compiles the kernels, and what `make setup` asks before it installs: standard library only.

    python -m pmm.utils.cuda_toolkit driver     fails if the driver is too old for torch, before gigabytes are installed
    python -m pmm.utils.cuda_toolkit nvcc       the package to install, where torch's own packages lack nvcc alone

With PMM_BUILD_CUDA=0 nothing is asked for.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from pmm.utils.cuda_versions import GpuLibrary, gpu_libraries, too_new_for
from pmm.utils.hardware import driver_version, installed_version

VARIABLES = ("CUDA_HOME", "CUDA_PATH")
USUAL = Path("/usr/local/cuda")
TOOLKIT = "CUDA toolkit (bin/nvcc and lib*/libcudart_static.a)"
WHEELS = "cuda-toolkit[nvcc,nvvm,crt]"
"""Compiler and headers beside the libraries that torch for CUDA 13 depends on, in the same folder; about 100 MB. The
extra nvcc alone leaves the versions of the others open, and they belong together."""
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def named_toolkit() -> tuple[str, Path] | None:
    """The variable of the environment that names a toolkit, and the folder."""
    return next(((name, Path(os.environ[name])) for name in VARIABLES if os.environ.get(name)), None)


def find_toolkit() -> Path | None:
    """The folder of the CUDA toolkit: the one that is named, or none; else the usual one, that of the nvcc on PATH, or
    that of this Python's packages."""
    if named := named_toolkit():
        candidates = [named[1]]
    else:
        nvcc = shutil.which("nvcc")  # which may be a wrapper in another folder than the toolkit's
        candidates = [USUAL, *([Path(nvcc).resolve().parents[1]] if nvcc else []), *_package_folders()]
    return next((folder for folder in candidates if is_toolkit(folder)), None)


def is_toolkit(folder: Path) -> bool:
    """Whether it can compile and link."""
    return (folder / "bin" / "nvcc").exists() and bool(list(folder.glob("lib*/libcudart_static.a")))


def missing_nvcc() -> str:
    """The package that makes a toolkit of torch's own packages; empty if there is a toolkit, or torch has none of its
    own, as one for CUDA 12."""
    version = installed_version("cuda-toolkit") or ""
    if os.environ.get("PMM_BUILD_CUDA") == "0" or named_toolkit() or find_toolkit() or not _package_folders():
        return ""
    return f"{WHEELS}=={version}" if version else ""


def driver_problem() -> str:
    """Why the installed torch, or else the one that is about to be installed, does not fit the driver, and what to do;
    empty if it does, or there is no driver."""
    if os.environ.get("PMM_BUILD_CUDA") == "0" or not (driver := driver_version()):
        return ""
    torch = next((library for library in gpu_libraries() if library.name == "torch"), None) or _pinned_torch()
    if torch is None or not (problem := too_new_for(driver, [torch])):
        return ""
    return f"{problem} (in .venv), then make setup again; or make setup PMM_BUILD_CUDA=0, for the CPU alone"


def _pinned_torch() -> GpuLibrary | None:
    try:
        pins = dict(re.findall(r"^(torch|cuda-toolkit)==([\d.]+)", CONSTRAINTS.read_text(), re.MULTILINE))
    except OSError:
        return None
    return GpuLibrary("torch", pins["torch"], pins["cuda-toolkit"]) if len(pins) == 2 else None


def _package_folders() -> list[Path]:
    """Of CUDA in the packages beside this Python, the newest major version first: nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return sorted((folder for place in places or () for folder in Path(place).glob("cu1[0-9]")), reverse=True)


def main(words: list[str]) -> int:
    """Entry point for `make setup`."""
    if words == ["nvcc"]:
        print(missing_nvcc())
    elif problem := driver_problem():
        print(f"make setup: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
