"""May an engine run here: its manifest, the GPU that is asked for, and where it was built."""

from __future__ import annotations

import logging
from pathlib import Path

from pmm.artifacts.manifest import EngineContract, Manifest
from pmm.runtime.fork import refuse_parents_gpu
from pmm.runtime.tf32 import TF32_ON, has_tf32
from pmm.runtime.trt_variant import RTX_CAPABILITIES, library_name, this_platform
from pmm.utils.errors import Unavailable, UserError
from pmm.utils.hardware import Gpu, cuda_index, gpu_at, nvidia_gpus

REBUILD = "build it here from its ONNX file with: pmm export trt"


def engine_manifest(path: Path, manifest: Manifest | None) -> tuple[Manifest, EngineContract]:
    """The manifest found beside an engine, and its part about the engine. Raises UserError without either."""
    if manifest is None:
        raise UserError(
            f"{path}: no manifest beside it ({path.name}.json); an engine is executable code, so only one with its "
            f"manifest is opened; {REBUILD}"
        )
    if manifest.engine is None:
        raise UserError(f"{path}: its manifest describes no engine; {REBUILD}")
    return manifest, manifest.engine


def chosen_gpu(path: Path, device: str) -> tuple[int, Gpu]:
    """The GPU that runs it, and its index; "auto" is the first one."""
    if device == "cpu":
        raise Unavailable(f"{path}: engines run on NVIDIA GPUs only; run its ONNX file on the CPU")
    index = cuda_index(device) or 0
    refuse_parents_gpu()
    if not nvidia_gpus():
        raise Unavailable(f"{path}: engines run on NVIDIA GPUs only, and the CUDA driver sees none here")
    return index, gpu_at(index)


def check_origin(path: Path, contract: EngineContract, version: str, gpu: Gpu) -> None:
    """Raises UserError naming all in which this machine differs from where the engine can run."""
    differs = []
    if version != contract.version:
        differs.append(f"{library_name(contract.flavor)} is {version} here, it was built with {contract.version}")
    if this_platform() != contract.platform:
        differs.append(f"this is {this_platform()}, it was built for {contract.platform}")
    here = f"{gpu.name} (compute capability {gpu.compute_capability})"
    portable = contract.portable
    if not portable and gpu.compute_capability != contract.compute_capability:
        differs.append(f"the GPU is {here}, it was built for {contract.gpu} ({contract.compute_capability})")
    # a portable engine of TensorRT itself says on loading whether this GPU will do
    if portable and contract.flavor == "rtx" and gpu.compute_capability not in RTX_CAPABILITIES:
        differs.append(f"the GPU is {here}, TensorRT-RTX runs on compute capability {', '.join(RTX_CAPABILITIES)}")
    if contract.hardware_compatibility == "none" and not portable and not differs and gpu.name != contract.gpu:
        # of the same machine code; kernels were chosen by times measured there (TensorRT logs the same warning)
        logging.getLogger("pmm").warning("%s: built on %s; on this %s it may be slower", path, contract.gpu, gpu.name)
    if differs:
        raise UserError(f"{path}: this engine cannot run here: {'; '.join(differs)}; {REBUILD}")


def engine_precision(manifest: Manifest, contract: EngineContract, gpu: Gpu) -> str:
    """In which the engine runs: fp32 with leave to use TF32 is tf32, if the GPU has it."""
    found = manifest.precision_found
    return "tf32" if found == "fp32" and TF32_ON in contract.flags and has_tf32(gpu) else found
