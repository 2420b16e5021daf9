"""The preprocessing contract: which crop a deployed graph takes, and how its pixels are normalised. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmm.config import Config

Crops = npt.NDArray[np.uint8]
"""RGB [N, H, W, 3], or one crop [H, W, 3]."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Size in pixels, and per-channel statistics (RGB, of pixels in 0..1). Bilinear resize; no crop, no padding."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or min(self.std) <= 0:
            raise ValueError(f"impossible preprocessing: {self.height}x{self.width}, std {self.std}")

    def normalise(self, crops: Crops) -> npt.NDArray[np.float32]:
        """uint8 RGB [B, H, W, 3] -> float32 [B, 3, H, W]: (x / 255 - mean) / std."""
        scale = 1 / (255 * np.asarray(self.std, np.float32))
        offset = np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray((crops * scale - offset).transpose(0, 3, 1, 2), dtype=np.float32)


def preprocessing_of(config: Config) -> Preprocessing:
    """The preprocessing contract that a run's configuration states."""
    data = config.data
    return Preprocessing(height=data.height, width=data.width, mean=data.mean, std=data.std)
