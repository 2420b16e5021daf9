"""May an engine run here: the GPU that is asked for, and where it was built."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from pmm.artifacts.manifest import EngineContract, Manifest
from pmm.artifacts.native_file import check_origin
from pmm.runtime.fork import refuse_parents_gpu
from pmm.runtime.trt_variant import RTX_CAPABILITIES, TF32_ON, this_platform
from pmm.utils.errors import BackendUnavailable
from pmm.utils.hardware import Gpu, cuda_index, gpu_at, nvidia_gpus


def chosen_gpu(path: Path, device: str) -> tuple[int, Gpu]:
    """The GPU that runs it, and its index; "auto" is the first one."""
    if device == "cpu":
        raise BackendUnavailable(f"{path}: engines run on NVIDIA GPUs only; run its ONNX file on the CPU")
    index = cuda_index(device) or 0
    refuse_parents_gpu()
    if not nvidia_gpus():
        raise BackendUnavailable(f"{path}: engines run on NVIDIA GPUs only, and the CUDA driver sees none here")
    return index, gpu_at(index)


def check_engine(path: Path, contract: EngineContract, version: str, gpu: Gpu) -> None:
    """Raises UserError naming all in which this machine, whose library is of `version`, differs from where the engine
    can run."""
    here = dataclasses.replace(
        contract, version=version, platform=this_platform(), gpu=gpu.name, compute_capability=gpu.compute_capability
    )
    # a portable engine of TensorRT itself says on loading whether this GPU will do
    capabilities = () if contract.portable else (contract.compute_capability,)
    check_origin(path, contract, here, RTX_CAPABILITIES if contract.flavor == "rtx" else capabilities)
    if contract.hardware_compatibility == "none" and not contract.portable and gpu.name != contract.gpu:
        # of the same machine code; kernels were chosen by times measured there (TensorRT logs the same warning)
        logging.getLogger("pmm").warning("%s: built on %s; on this %s it may be slower", path, contract.gpu, gpu.name)


def engine_precision(manifest: Manifest, contract: EngineContract, gpu: Gpu) -> str:
    """In which the engine runs: fp32 with leave to use TF32 is tf32, if the GPU has it."""
    found = manifest.precision_found
    return "tf32" if found == "fp32" and TF32_ON in contract.flags and gpu.has_tf32 else found
