"""The mistakes that are made most in preparing crops for a network: what it is fed where its contract is not kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pmm.data.preprocessing import Crops, Preprocessing

FEWEST_LEVELS = 32
"""Of grey that a mistake has to leave, to be seen through images of whole numbers as a network would see it."""


@dataclass(frozen=True, kw_only=True)
class PreprocessingMistake:
    """Crops are resized as `made` says (it goes where `runner.preprocessing` goes: `iter_crops`, `load_crops`), and
    then `fed` is what a runner of the contract `expected` is called with."""

    name: Literal["bgr", "resize", "stretched", "unnormalised"]
    description: str
    """In words, as `OpenCV's bilinear, not PIL's bilinear`."""
    expected: Preprocessing
    made: Preprocessing
    """Of the mistake: its resize, and the statistics that pixels are normalised with."""
    colour: Literal["rgb", "bgr"] = "rgb"

    def fed(self, crops: Crops) -> Crops:
        """RGB crops [N, H, W, 3] of the right size -> those from which a runner makes what the mistake would feed.

        A runner normalises by `expected`, so for other statistics it is fed other grey levels: the nearest, so within
        half a level of what the network would see, and no darker than black nor brighter than white.
        """
        if self.colour == "bgr":
            crops = crops[..., ::-1]
        right, made = self.expected, self.made
        if (right.mean, right.std) != (made.mean, made.std):
            scale = np.asarray(right.std, np.float32) / np.asarray(made.std, np.float32)
            offset = np.asarray(right.mean, np.float32) - np.asarray(made.mean, np.float32) * scale
            crops = np.rint(crops * scale + 255 * offset).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(crops)

    @property
    def problem(self) -> str:
        """Why runners cannot be fed it; empty if they can."""
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None, None], (256, 1, 1, 3))
        levels = min(len(np.unique(channel)) for channel in self.fed(ramp).reshape(256, 3).T)
        return "" if levels >= FEWEST_LEVELS else f"images of whole numbers hold {levels} levels of grey of it"


def likely_mistakes(expected: Preprocessing) -> tuple[PreprocessingMistake, ...]:
    """The mistakes that can be made where `expected` is the contract, each alone; a mistake that would change nothing,
    as normalising nothing where nothing is to be normalised, is left out."""
    other_resize = dataclasses.replace(expected, interpolation="bilinear", antialias=not expected.antialias)
    stretched = dataclasses.replace(expected, padding=None)
    unnormalised = dataclasses.replace(expected, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = [
        PreprocessingMistake(name="bgr", description="BGR, not RGB", expected=expected, made=expected, colour="bgr"),
        PreprocessingMistake(
            name="resize",
            description=f"{other_resize.filter_name}, not {expected.filter_name}",
            expected=expected,
            made=other_resize,
        ),
        PreprocessingMistake(name="stretched", description="stretched, not padded", expected=expected, made=stretched),
        PreprocessingMistake(
            name="unnormalised",
            description="pixels in 0..1, not normalised",
            expected=expected,
            made=unnormalised,
        ),
    ]
    return tuple(mistake for mistake in found if (mistake.made, mistake.colour) != (expected, "rgb"))
