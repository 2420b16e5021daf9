"""What is said of the images that a foreign network takes, and what is assumed elsewhere. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pmm.config import IMAGENET_MEAN, IMAGENET_STD, MAX_SIDE
from pmm.data.preprocessing import MAX_OF_UNIT, Colours, Interpolation, Preprocessing
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How the network takes its images; None for what is not said. Raises ConflictingOptions for half of it."""

    height: Annotated[int | None, Arg(least=1, most=MAX_SIDE)] = None
    """Height in pixels (default: that of an ONNX file; for a factory it must be given)."""
    width: Annotated[int | None, Arg(least=1, most=MAX_SIDE)] = None
    """Width in pixels (default: as for --height)."""
    mean: Annotated[Colours | None, Arg("A B C")] = None
    """Mean of each channel, in the network's order of channels and after --scale (default: ImageNet's)."""
    std: Annotated[Colours | None, Arg("A B C")] = None
    """Standard deviation of each channel, as --mean (default: ImageNet's)."""
    colour: Literal["rgb", "bgr"] | None = None
    """Order of the channels that it takes (default: rgb)."""
    scale: Literal["1/255", "1"] | None = None
    """What its pixels are multiplied by before --mean and --std: 1 leaves them at 0 to 255 (default: 1/255)."""
    interpolation: Interpolation | None = None
    """How crops are resized (default: bilinear)."""
    antialias: bool | None = None
    """With antialias as PIL resizes, without as OpenCV's bilinear does (default: with)."""
    padding: Annotated[tuple[int, int, int] | None, Arg("R G B")] = None
    """Keep the ratio of a crop's sides and fill the rest with this colour, 0 to 255 (default: crops are stretched)."""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            problem = f"{{{given}}} needs {{{missing}}}"
            raise ConflictingOptions(problem, given, missing, expected="both or neither")
        if self.scale == "1" and self.mean is None:
            problem = "{scale} 1 needs {mean} and {std}, of pixels from 0 to 255"
            hint = "for none give {mean} 0 0 0 {std} 1 1 1"
            raise ConflictingOptions(problem, "scale", "mean", "std", hint=hint)
        if self.mean and self.std:
            _check_unit(self.mean, self.std, self.scale or "1/255")
        if self.height and self.width:
            self.preprocessing(self.height, self.width)  # a wrong value is better noticed now

    def preprocessing(self, height: int, width: int) -> Preprocessing:
        """The contract for RGB images of pixels in 0..1: where the network takes BGR, its statistics in the order of
        RGB. Raises InvalidValue or ConflictingOptions for what no contract can have."""
        unit = 255.0 if self.scale == "1" else 1.0
        mean, std = (
            [value / unit for value in each] for each in (self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD)
        )
        if self.colour == "bgr" and self.mean is not None:
            mean, std = mean[::-1], std[::-1]
        return Preprocessing(
            height=height,
            width=width,
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            interpolation=self.interpolation or "bilinear",
            antialias=True if self.antialias is None else self.antialias,
            padding=self.padding,
        )

    def assumptions(self) -> list[str]:
        """What was not given, and is taken for granted: the flags that would have said so."""
        assumed = {
            "--colour rgb": self.colour,
            "--scale 1/255": self.scale,
            "--mean and --std ImageNet's": self.mean,
            "--interpolation bilinear": self.interpolation,
            "--antialias (as PIL resizes)": self.antialias,
            "stretched without --padding": self.padding,
        }
        return [text for text, given in assumed.items() if given is None]


def _check_unit(mean: Colours, std: Colours, scale: Literal["1/255", "1"]) -> None:
    """Raises ConflictingOptions for statistics of pixels in 0..1 with scale 1, and of 0 to 255 without."""
    means, stds = (" ".join(f"{value:g}" for value in each) for each in (mean, std))
    stated = f"{{mean}} is {means}, {{std}} is {stds}"
    largest = max(map(abs, mean))
    if scale == "1/255" and max(largest, *std) > MAX_OF_UNIT:
        problem, unit, other = f"{stated}, {{scale}} is 1/255", "of pixels in 0..1", "of 0 to 255, add {scale} 1"
    elif scale == "1" and 0 < largest <= 1:
        problem, unit, other = f"{stated}, {{scale}} is 1", "of pixels from 0 to 255", "in 0..1, leave {scale} 1 out"
    else:
        return
    raise ConflictingOptions(
        problem, "mean", "std", "scale", expected=f"statistics {unit}", hint=f"if they are {other}"
    )
