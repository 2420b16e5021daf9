"""What is said of a foreign ONNX file, beside its images. Loads no onnx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pmm.utils.arguments import Arg

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """What the file does not tell of itself, and how its graph is to take images."""

    input: Annotated[str, Arg("NAME")] = ""
    """Name of the images, if several inputs could be them."""
    layout: Layout | None = None
    """Order of the input's axes, if the file does not tell."""
    uint8: bool = False
    """Let the file take uint8 NHWC RGB images, as those of pmm export onnx do: the normalisation, and the order of axes
    and channels, go into the graph."""
