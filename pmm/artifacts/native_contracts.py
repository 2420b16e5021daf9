"""The part of a manifest about native code: what an engine or a package was built with, and so where it can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pmm.artifacts.batch_profiles import BatchProfiles

HardwareCompatibility = Literal["none", "same-compute-capability", "ampere-plus"]
"""The other GPUs that TensorRT builds an engine for."""


@dataclass(frozen=True, kw_only=True)
class EngineContract:
    """What an engine was built with, and so where it can run."""

    kind: ClassVar[str] = "engine"
    rebuild: ClassVar[str] = "build it here from its ONNX file with: pmm export trt"
    instructions: ClassVar[tuple[str, ...]] = ()

    flavor: Literal["tensorrt", "rtx"]
    version: str
    """Of the builder; the runtime must be the same."""
    batch: BatchProfiles
    onnx_sha256: str
    platform: str
    """Operating system and processor, as linux-x86_64."""
    gpu: str
    """Name of the GPU it was built on; empty for TensorRT-RTX without one."""
    compute_capability: str
    """Of that GPU, as 8.9; empty without one."""
    hardware_compatibility: HardwareCompatibility
    """As TensorRT built it; TensorRT-RTX compiles its engines for the GPU that runs them."""
    driver: str
    """Highest CUDA version of the driver, as 13.0; empty without one."""
    flags: tuple[str, ...]
    """What else shaped the build, by name."""
    precision_read_from: Literal["parsed network", "parsed network and engine inspector"]
    """The shares are the parsed network's; the inspector tells which types are in the engine."""

    @property
    def library(self) -> str:
        """The library that builds and runs it, by the name of its package."""
        return "tensorrt" if self.flavor == "tensorrt" else "tensorrt-rtx"

    @property
    def portable(self) -> bool:
        """Whether it runs on GPUs of other compute capabilities than the one it was built on."""
        return self.flavor == "rtx" or self.hardware_compatibility == "ampere-plus"


@dataclass(frozen=True, kw_only=True)
class PackageContract:
    """What an AOTInductor package was built with, and so where it can run: it holds code for one kind of processor."""

    kind: ClassVar[str] = "package"
    rebuild: ClassVar[str] = "build it here from its checkpoint with: pmm export aoti"
    library: ClassVar[str] = "torch"

    device: Literal["cpu", "cuda"]
    torch: str
    """Version of the builder; the runtime must be the same."""
    platform: str
    """Operating system and processor, as linux-x86_64."""
    instructions: tuple[str, ...]
    """Instruction sets of the CPU it was built on; the CPU must have all of them."""
    gpu: str
    """Name of the GPU it was built on; empty for the CPU."""
    compute_capability: str
    """Of that GPU, as 8.9; the GPU must have the same. Empty for the CPU."""
    precision_read_from: Literal["exported graph"]

    @property
    def version(self) -> str:
        """The version of the library."""
        return self.torch
