"""The reference: the original checkpoint in eager torch, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pmm.artifacts.manifest import EmbeddingContract
from pmm.artifacts.trained_model import read_model
from pmm.data.preprocessing import Preprocessing
from pmm.runtime.base import RunnerInfo
from pmm.runtime.fork import check_cuda_after_fork
from pmm.runtime.torch_runner import TorchRunner
from pmm.utils.cuda_versions import advice
from pmm.utils.errors import BackendUnavailable
from pmm.utils.hardware import cuda_index, gpu_at


class ChannelScale(nn.Module):
    """Images float32 [B, 3, H, W] -> x * scale - offset, with one of each per channel [3]."""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: npt.NDArray[np.float32], offset: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.from_numpy(scale).view(3, 1, 1))
        self.register_buffer("offset", torch.from_numpy(offset).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale - self.offset


class Normalise(ChannelScale):
    """`Preprocessing.normalise` in torch: uint8 RGB [B, H, W, 3] -> float32 [B, 3, H, W]."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__(*preprocessing.scale_and_offset())

    def forward(self, images: Tensor) -> Tensor:
        # cast before the transpose: TensorRT transposes no uint8
        return super().forward(images.float().permute(0, 3, 1, 2))


class EagerRunner(TorchRunner):
    """A model in eval mode behind the runner contract: in fp32, or with `tf32`, on a GPU, in TF32."""

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        threads: int = 0,
        *,
        tf32: bool = False,
    ) -> None:
        """Raises BackendUnavailable for TF32 on a device without it."""
        super().__init__(preprocessing, EmbeddingContract.of(model), device, threads, tf32=tf32)
        self.model = model.to(device).eval()
        self.normalise = Normalise(preprocessing).to(device)
        self.info = RunnerInfo(
            backend="torch",
            device=self.device_name(),
            precision="tf32" if tf32 else "fp32",
            provider=f"torch {torch.__version__}",
        )

    @classmethod
    def open(cls, checkpoint: str | Path, device: str = "cpu", threads: int = 0, *, tf32: bool = False) -> EagerRunner:
        """From a checkpoint file. Raises UserError as `read_model` and as the constructor."""
        trained = read_model(checkpoint)
        runner = cls(trained.model, trained.preprocessing, torch_device(device), threads, tf32=tf32)
        runner._path, runner.method = trained.path, trained.method
        return runner

    def _run(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images))


def torch_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a torch device. Raises BackendUnavailable if torch cannot use CUDA, or
    that GPU is missing."""
    index = cuda_index(name)
    if name == "cpu":  # without a look at the GPUs, which takes time, and memory of theirs
        return torch.device(name)
    check_cuda_after_fork()
    usable = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if usable else "cpu")
    if not usable:
        hint = advice("torch") or "check the driver"
        raise BackendUnavailable(f"--device {name}: torch sees no usable CUDA GPU", hint=f"use --device cpu, or {hint}")
    if index:
        gpu_at(index)
    return torch.device(name)
