"""Which CUDA the installed libraries are built for and the driver serves, and what to install if they do not fit.

Read from the packages' files: no library is loaded. A driver serves its major version of CUDA, in all minor ones,
and those before it (NVIDIA, "CUDA Compatibility"). torch and ONNX Runtime both load a `libcudnn.so.9`, which is another
file for each major version of CUDA; TensorRT shares no library of CUDA with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from pmm.utils.hardware import driver_version, nvidia_gpus

MIN_DRIVER = {12: "525", 13: "580"}
"""Major version of CUDA -> oldest driver that serves it."""
_CUDA_FILES = {"torch": "torch/version.py", "onnxruntime-gpu": "onnxruntime/capi/build_and_package_info.py"}
_CUDA = re.compile(r"^cuda(?:_version)?\b[^=\n]*=\s*['\"](\d[\d.]*)", re.MULTILINE)
_ENGINES = ("tensorrt", "tensorrt-rtx")
_INSTALL = {
    # 1.19 to 1.26 are built for CUDA 12, those from 1.27 on for CUDA 13; what 1.27 asks for is not on the registry
    ("onnxruntime-gpu", 12): '"onnxruntime-gpu[cuda,cudnn]>=1.23,<1.27"',
    ("onnxruntime-gpu", 13): '"onnxruntime-gpu[cuda,cudnn]>=1.28"',
    ("torch", 13): "torch torchvision",
}
TORCH_12 = "torch and torchvision for CUDA 12 by the command that the selector on PyTorch's page of installation gives"


class GpuLibrary(NamedTuple):
    """An installed library that uses GPUs."""

    name: str
    """As the package registry calls it."""
    version: str
    cuda: str
    """Version of CUDA that it is built for: 13.0, or the major one alone; empty if it is not built for GPUs."""

    @property
    def major(self) -> int:
        """0 without CUDA."""
        return int(self.cuda.partition(".")[0] or 0)


class Misfit(NamedTuple):
    """Libraries that cannot work here, and one line that says why and what to do."""

    names: tuple[str, ...]
    text: str


def gpu_libraries() -> list[GpuLibrary]:
    """The installed ones: torch, ONNX Runtime for GPUs, TensorRT and TensorRT-RTX in each build."""
    libraries = []
    for name, file in _CUDA_FILES.items():
        if distribution := _distribution(name):
            try:
                cuda = _CUDA.search(Path(str(distribution.locate_file(file))).read_text())
            except OSError:
                cuda = None
            libraries.append(GpuLibrary(name, distribution.version, cuda[1] if cuda else ""))
    for name in _ENGINES:  # the build is part of the name: its libraries are for one major version
        builds = ((major, _distribution(f"{name}-cu{major}")) for major in (11, *MIN_DRIVER))
        libraries += [GpuLibrary(name, found.version, str(major)) for major, found in builds if found]
    return libraries


def side_by_side() -> dict[str, str]:
    """Library, and "driver" -> version of CUDA; "none" where there is none, both where two builds are installed."""
    rows = {"driver": driver_version() or "none"}
    for library in gpu_libraries():
        before = f"{rows[library.name]} and " if library.name in rows else ""
        rows[library.name] = before + (library.cuda or "none")
    return rows


def misfits() -> list[Misfit]:
    """Libraries that cannot work: built for a CUDA that the driver does not serve, or that exclude each other."""
    libraries, driver = gpu_libraries(), driver_version()
    served = int(driver.partition(".")[0] or 0)
    usable = min(served or max(MIN_DRIVER), max(MIN_DRIVER))
    problems = []
    for name in _ENGINES:
        if len(builds := [library.cuda for library in libraries if library.name == name]) > 1:
            text = f"{name} is installed for CUDA {' and '.join(builds)}, which overwrite each other's files: "
            problems.append(Misfit((name,), text + command([name], usable)))
    too_new = list(dict.fromkeys(library for library in libraries if served and library.major > served))
    if too_new:
        problems.append(Misfit(tuple(library.name for library in too_new), too_new_for(driver, too_new)))
    pair = [library for library in libraries if library.name in _CUDA_FILES and library.cuda and library not in too_new]
    if len({library.major for library in pair}) > 1:
        torch, ort = pair
        text = f"{_listed(pair)}, and each needs another libcudnn.so.9: "
        problems.append(Misfit((torch.name, ort.name), text + command([ort.name], torch.major)))
    plain = [library for library in libraries if library.name == "torch" and not library.cuda]
    if plain and nvidia_gpus():
        text = (
            f"torch {plain[0].version} is built without CUDA, and this machine has a GPU: {command(['torch'], usable)}"
        )
        problems.append(Misfit(("torch",), text))
    return problems


def too_new_for(driver: str, libraries: Sequence[GpuLibrary]) -> str:
    """What to do about those of `libraries` that are built for a CUDA which the `driver`, of the CUDA version that it
    serves, does not serve; empty if there are none."""
    served = int(driver.partition(".")[0])
    too_new = [library for library in libraries if library.major > served]
    if not too_new:
        return ""
    newest = max(library.major for library in too_new)
    least = f" to {MIN_DRIVER[newest]} or later" if newest in MIN_DRIVER else ""
    other = f", or {command([library.name for library in too_new], served)}" if served in MIN_DRIVER else ""
    return f"{_listed(too_new)}, and the driver serves CUDA {driver} at most: update the NVIDIA driver{least}{other}"


def advice(name: str) -> str:
    """What keeps the library of that name from the GPU here, and what to do; empty if nothing is known to."""
    return "; ".join(misfit.text for misfit in misfits() if name in misfit.names)


def command(names: Sequence[str], major: int) -> str:
    """The command that installs the builds of these libraries for CUDA `major`, one of MIN_DRIVER's."""
    remove, install = [], []
    for name in names:
        if name in _ENGINES:
            builds = (f"{name}-cu{m}{part}" for m in (11, *MIN_DRIVER) for part in ("", "-libs", "-bindings"))
            remove += [each for each in (name, *builds) if _distribution(each)]
            install.append(f"{name}-cu{major}")
        elif name == "torch":
            remove += ["torch", "torchvision"]  # else pip leaves the installed build
        if (name, major) in _INSTALL:
            install.append(_INSTALL[name, major])
    lines = [f"pip uninstall -y {' '.join(remove)}"] if remove else []
    lines += [f"pip install {' '.join(install)}"] if install else []
    by_selector = f", then {TORCH_12}" if "torch" in names and ("torch", major) not in _INSTALL else ""
    return " && ".join(lines) + by_selector


def _listed(libraries: Sequence[GpuLibrary]) -> str:
    return ", ".join(f"{library.name} {library.version} is built for CUDA {library.cuda}" for library in libraries)


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
