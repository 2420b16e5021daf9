"""The reference: the original checkpoint in eager fp32 torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pmm.data.crops import Crops, Preprocessing, preprocessing_of
from pmm.errors import UserError
from pmm.manifest import EmbeddingContract
from pmm.runtime.base import Embeddings, Runner, RunnerInfo, Step


class Normalise(nn.Module):
    """`Preprocessing.normalise` in torch: uint8 RGB [B, H, W, 3] -> float32 [B, 3, H, W]."""

    scale: Tensor
    offset: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float().view(3, 1, 1))
        self.register_buffer("offset", (mean / std).float().view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # cast before the transpose: TensorRT transposes no uint8
        return images.float().permute(0, 3, 1, 2) * self.scale - self.offset


class EagerRunner(Runner):
    """A model in eval mode behind the runner contract, in fp32 (TF32 off)."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, device: torch.device, threads: int = 0) -> None:
        self.device = device
        # of the whole process, as torch has it; given back on `close`
        self._threads_before = torch.get_num_threads()
        if threads:
            torch.set_num_threads(threads)
        self.model = model.to(device).eval()
        self.normalise = Normalise(preprocessing).to(device)
        self.preprocessing = preprocessing
        self.embedding = EmbeddingContract(dim=int(model.embedding_dim))  # type: ignore[arg-type]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.info = RunnerInfo(backend="torch", device=name, precision="fp32", provider=f"torch {torch.__version__}")

    @classmethod
    def open(cls, checkpoint: str | Path, device: str = "cpu", threads: int = 0) -> EagerRunner:
        """From a checkpoint file. Raises UserError as `pmm.checkpoint.load`."""
        from pmm.checkpoint import load, restore_model

        model, config = restore_model(load(checkpoint), checkpoint)
        return cls(model, preprocessing_of(config), torch_device(device), threads)

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)

    def __call__(self, images: Crops) -> Embeddings:
        self.check(images)
        return self._forward(torch.from_numpy(images).to(self.device)).float().cpu().numpy()

    def bind(self, images: Crops) -> Step:
        self.check(images)
        placed = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)

        def step() -> None:
            self._forward(placed)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return Step(step)

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        # a reference in fp32 must not run in TF32, whatever the process has set
        matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            return self.model(self.normalise(images))
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def torch_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" as a torch device. Raises UserError if CUDA is asked for and torch cannot use it."""
    usable = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if usable else "cpu")
    if name == "cuda" and not usable:
        raise UserError("--device cuda: torch sees no usable CUDA GPU; use --device cpu, or check the driver")
    if name not in ("cpu", "cuda"):
        raise UserError(f"unknown device '{name}'; known: auto, cpu, cuda")
    return torch.device(name)
