"""The preprocessing contract: an image file -> the uint8 crop a deployed graph takes, and its normalisation.

Everything that evaluates, exports, verifies or serves goes through here, so that no two paths resize differently.
PIL and numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pmm.config import Config
from pmm.errors import UserError

Crops = npt.NDArray[np.uint8]


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


def load_crop(path: str | Path, height: int, width: int) -> Crops:
    """The image at `path` as uint8 RGB [height, width, 3]: EXIF-rotated upright, converted to RGB, resized bilinearly.

    Raises UserError naming the file if it cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            upright = _to_rgb(ImageOps.exif_transpose(image))
            if upright.size != (width, height):
                upright = upright.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(upright)
    except Exception as error:  # decoders and EXIF parsers raise anything on a file made to harm
        reason = str(error).replace(str(path), "file") or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. 16-bit grey is scaled, where PIL would clip it to white; other deep images have no known scale."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image, np.uint16)
        return Image.fromarray(np.rint(deep / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; convert it to 8 bits")
    return image.convert("RGB")


def iter_crops(paths: Sequence[Path], height: int, width: int, batch_size: int, threads: int = 4) -> Iterator[Crops]:
    """Batches uint8 [B, height, width, 3] in the order of `paths`, decoded ahead by `threads` threads."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.map(lambda p: load_crop(p, height, width), batch) for batch in batches[:2]]
        for index in range(len(batches)):
            if index + 2 < len(batches):
                ahead.append(pool.map(lambda p: load_crop(p, height, width), batches[index + 2]))
            yield np.stack(list(ahead.pop(0)))


def load_crops(paths: Sequence[Path], height: int, width: int, threads: int = 4) -> Crops:
    """All of `paths` as one array uint8 [N, height, width, 3]."""
    return np.concatenate([np.empty((0, height, width, 3), np.uint8), *iter_crops(paths, height, width, 64, threads)])
