"""What torch does several times as fast as PIL, with the same bits: enlarging RGB pixels by small whole factors.

PIL states what a crop is, and resizes all else. torch serves only a process that has loaded it (importing it takes
seconds, and an ONNX file runs without).
"""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
from PIL import Image

from pmm.data.preprocessing import Crops

FACTORS = (1, 2, 3, 4)
"""For these alone torch's weights of 15 bits give what PIL's of 22 give: a pixel is then a sum of sixths or eighths of
two neighbours, which is far from a tie or is one, and at a tie both have rounded the weights to the same side.
"""
PROVED = ("AVX2", "AVX512")
"""Instructions with which torch is fast, and PIL's equal for every pair of neighbours (its test tries all)."""


def can_enlarge(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether `enlarge` does, here and now, what PIL's bilinear resize from `size` to `target` would."""
    whole = all(after % before == 0 and after // before in FACTORS for before, after in zip(size, target, strict=True))
    return whole and sys.modules.get("torch") is not None and _equals_pil()


def enlarge(pixels: Crops, height: int, width: int) -> Crops:
    """`pixels` uint8 RGB [H, W, 3] resized bilinearly to [height, width, 3]; they must be writable, as torch could."""
    import torch

    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # so that the strides say channels_last
    resized = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
    enlarged: Crops = resized[0].permute(1, 2, 0).numpy()
    return enlarged


@cache
def _equals_pil() -> bool:
    """Whether this torch is one of `PROVED`, and a try says so too."""
    import torch

    if torch.backends.cpu.get_cpu_capability() not in PROVED:
        return False
    pixels = np.random.default_rng(0).integers(0, 256, (21, 13, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((2 * 13, 3 * 21), Image.Resampling.BILINEAR)
    return np.array_equal(enlarge(pixels, 3 * 21, 2 * 13), np.asarray(expected))
