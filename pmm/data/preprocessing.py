"""The preprocessing contract: which crop a deployed graph takes, and how its pixels are normalised. Loads no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pmm.config import Config
from pmm.utils.errors import ConflictingOptions, InvalidValue

Crops = npt.NDArray[np.uint8]
"""RGB [N, H, W, 3], or one crop [H, W, 3]."""
Colours = tuple[float, float, float]
"""A mean or a std, of each channel."""
MAX_OF_UNIT = 2
"""No mean and no std of pixels in 0..1 is larger."""
Interpolation = Literal["bilinear", "bicubic", "lanczos"]
RESIZES: dict[tuple[str, bool], str] = {
    ("bilinear", True): "PIL's bilinear",
    ("bicubic", True): "PIL's bicubic",
    ("lanczos", True): "PIL's Lanczos",
    ("bilinear", False): "OpenCV's bilinear",
}
"""What can be done to the last grey level, by interpolation and antialias."""


@dataclass(frozen=True, kw_only=True)
class Resize:
    """How crops of any size come to one size. Raises InvalidValue or ConflictingOptions for what cannot be.

    With antialias as PIL resizes: each pixel is a mean of all that it covers. Without as `cv2.resize` does where it is
    not told otherwise (INTER_LINEAR): of the four nearest, however many it covers. OpenCV's bicubic is left out: it
    gives other pixels where OpenCV has Intel's IPP than where it has not.
    """

    height: int
    width: int
    """In pixels."""
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    padding: tuple[int, int, int] | None = None
    """None: a crop is stretched to the size. Else it keeps its ratio of sides (see `content_size`) and stands in the
    middle; the rest is of this colour (RGB, 0 to 255), and an odd pixel of it goes to the bottom or the right."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise InvalidValue(name, getattr(self, name), "1 or more")
        if self.interpolation not in get_args(Interpolation):
            raise InvalidValue("interpolation", self.interpolation, choices=get_args(Interpolation))
        if (self.interpolation, self.antialias) not in RESIZES:
            raise ConflictingOptions(
                f"{{interpolation}} {self.interpolation} needs {{antialias}}", "interpolation", "antialias",
                expected="{antialias} (as PIL), or {interpolation} bilinear without it (as OpenCV)",
            )  # fmt: skip
        if self.padding is not None and not (len(self.padding) == 3 and all(0 <= c <= 255 for c in self.padding)):
            raise InvalidValue("padding", self.padding, "red, green and blue, each 0 to 255")

    def content_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which a crop of `height` x `width` is resized, before anything is filled up.

        With padding, one side is that of the result; the other, in the crop's ratio, is rounded to the nearest pixel
        (a half to the even one), and is at least 1.
        """
        if self.padding is None:
            return self.height, self.width
        if height * self.width > width * self.height:
            return self.height, max(1, round(width * self.height / height))
        return max(1, round(height * self.width / width)), self.width

    @property
    def filter_name(self) -> str:
        """Whose interpolation it is, as `PIL's bilinear`."""
        return RESIZES[self.interpolation, self.antialias]

    def describe(self) -> str:
        """In words, as `256x128, OpenCV's bilinear, padded with 0 0 0`."""
        padded = "" if self.padding is None else f", padded with {' '.join(map(str, self.padding))}"
        return f"{self.height}x{self.width}, {self.filter_name}{padded}"


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Resize):
    """The resize, and the statistics per channel (RGB, of pixels in 0..1) that normalise its crops."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(map(math.isfinite, self.mean)):
            raise InvalidValue("mean", self.mean, "finite numbers, of pixels in 0..1")
        if not all(math.isfinite(each) and each > 0 for each in self.std):
            raise InvalidValue("std", self.std, "numbers above 0, of pixels in 0..1")

    def normalise(self, crops: Crops) -> npt.NDArray[np.float32]:
        """uint8 RGB [B, H, W, 3] -> float32 [B, 3, H, W]: (x / 255 - mean) / std."""
        scale, offset = self.scale_and_offset()
        return np.ascontiguousarray((crops * scale - offset).transpose(0, 3, 1, 2), dtype=np.float32)

    def scale_and_offset(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Per channel [3]: a pixel x of 0..255 is normalised to x * scale - offset."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return (1 / (255 * std)).astype(np.float32), (mean / std).astype(np.float32)

    def scale_and_offset_from(self, other: Preprocessing) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Per channel [3]: what `other` normalised to x, this one normalises to x * scale - offset."""
        mean, std, mean_before, std_before = (np.asarray(s) for s in (self.mean, self.std, other.mean, other.std))
        return (std_before / std).astype(np.float32), ((mean - mean_before) / std).astype(np.float32)

    def describe(self) -> str:
        """In words, as `256x128, PIL's bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225`."""
        mean, std = (" ".join(f"{value:.6g}" for value in each) for each in (self.mean, self.std))
        return f"{super().describe()}, mean {mean}, std {std}"

    def facts(self) -> dict[str, Any]:
        """Plain values, as pmm info prints them."""
        return {**dataclasses.asdict(self), "padding": self.padding or "none (stretched)"}


def preprocessing_of(config: Config) -> Preprocessing:
    """The preprocessing contract that a run's configuration states."""
    data = config.data
    return Preprocessing(height=data.height, width=data.width, mean=data.mean, std=data.std)
