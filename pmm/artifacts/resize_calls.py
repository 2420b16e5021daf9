"""The library calls that resize as a contract says, exactly or nearly, and by how many grey levels they differ.

The figures are those of `bench.lab.resizes`, whose test holds this table to the file that it wrote. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROUNDING = 2
"""Grey levels: libraries that compute the same, in whole numbers of other widths, differ by no more."""
NEAR = 2.0
"""Grey levels, on average: what differs by more loses detail that the network knows, or shows it some that it does
not."""
OTHER = "another resize"

Differences = tuple[float, float]
"""Of the pixels, in grey levels: their mean, and the largest."""


def verdict(differences: Differences | None) -> str:
    """How close a resize with these differences comes, in words."""
    if differences is None:
        return "the same filter by its documentation, not measured"
    mean, most = differences
    if most <= ROUNDING:
        return "equal but for rounding" if most else "equal"
    return "near" if mean <= NEAR else OTHER


@dataclass(frozen=True, kw_only=True)
class ResizeCall:
    """One way to resize uint8 RGB pixels to w x h."""

    library: str
    call: str
    """As it is typed."""
    shrunk: Differences | None = None
    """Of crops shrunk to a third; None if it was not measured."""
    enlarged: Differences | None = None
    """Of crops enlarged to twice their size; None if it was not measured."""

    def facts(self) -> dict[str, Any]:
        """Plain values."""
        directions = {"to_shrink": self.shrunk, "to_enlarge": self.enlarged}
        return {"library": self.library, "call": self.call} | {
            name: {"verdict": verdict(found), **dict(zip(("mean", "most"), found or (), strict=False))}
            for name, found in directions.items()
        }


DEFINITIONS = {
    "PIL's bilinear": "f(t) = 1 - |t| for |t| < 1, else 0",
    "PIL's bicubic": "f(t) = 1.5 |t|^3 - 2.5 t^2 + 1 for |t| < 1, -0.5 |t|^3 + 2.5 t^2 - 4 |t| + 2 for |t| < 2, else 0",
    "PIL's Lanczos": "f(t) = sinc(t) sinc(t / 3) for |t| < 3, else 0, with sinc(t) = sin(pi t) / (pi t)",
}
"""The filters; how they are used is in `definition`."""

RESIZE_CALLS: dict[str, tuple[ResizeCall, ...]] = {
    "PIL's bilinear": (
        ResizeCall(
            library="Pillow",
            call="image.resize((w, h), Image.Resampling.BILINEAR)",
            shrunk=(0.0, 0.0),
            enlarged=(0.0, 0.0),
        ),
        ResizeCall(
            library="OpenVINO",
            call="PrePostProcessor resize(RESIZE_BILINEAR_PILLOW) of u8",
            shrunk=(0.0, 1.0),
            enlarged=(0.24, 2.0),
        ),
        ResizeCall(
            library="torchvision",
            call="v2.functional.resize(uint8, [h, w], BILINEAR, antialias=True)",
            shrunk=(0.0, 1.0),
            enlarged=(0.0, 0.0),
        ),
        ResizeCall(library="OpenCV", call="cv::resize(..., INTER_AREA)", shrunk=(1.48, 21.0), enlarged=(2.48, 66.0)),
        ResizeCall(
            library="OpenCV", call="cv::resize(..., INTER_LINEAR), the default", shrunk=(4.1, 65.0), enlarged=(0.3, 1.0)
        ),
        ResizeCall(
            library="sharp",
            call='resize(w, h, {fit: "fill", kernel: "linear", fastShrinkOnLoad: false})',
            shrunk=(0.29, 10.0),
            enlarged=(2.44, 54.0),
        ),
        ResizeCall(library="DALI", call="fn.resize(resize_x=w, resize_y=h, interp_type=INTERP_LINEAR, antialias=True)"),
    ),
    "PIL's bicubic": (
        ResizeCall(
            library="Pillow",
            call="image.resize((w, h), Image.Resampling.BICUBIC)",
            shrunk=(0.0, 0.0),
            enlarged=(0.0, 0.0),
        ),
        ResizeCall(
            library="OpenVINO",
            call="PrePostProcessor resize(RESIZE_BICUBIC_PILLOW) of u8",
            shrunk=(0.0, 1.0),
            enlarged=(0.01, 2.0),
        ),
        ResizeCall(
            library="torchvision",
            call="v2.functional.resize(uint8, [h, w], BICUBIC, antialias=True)",
            shrunk=(0.0, 1.0),
            enlarged=(0.0, 0.0),
        ),
        ResizeCall(library="OpenCV", call="cv::resize(..., INTER_AREA)", shrunk=(0.98, 11.0), enlarged=(2.25, 56.0)),
        ResizeCall(library="OpenCV", call="cv::resize(..., INTER_CUBIC)", shrunk=(4.26, 74.0), enlarged=(0.55, 14.0)),
        ResizeCall(
            library="sharp",
            call='resize(w, h, {fit: "fill", kernel: "cubic", fastShrinkOnLoad: false})',
            shrunk=(0.21, 6.0),
            enlarged=(2.56, 61.0),
        ),
    ),
    "PIL's Lanczos": (
        ResizeCall(
            library="Pillow",
            call="image.resize((w, h), Image.Resampling.LANCZOS)",
            shrunk=(0.0, 0.0),
            enlarged=(0.0, 0.0),
        ),
        ResizeCall(
            library="OpenVINO",
            call="PrePostProcessor resize(RESIZE_BICUBIC_PILLOW) of u8",
            shrunk=(0.99, 15.0),
            enlarged=(0.57, 14.0),
        ),
        ResizeCall(library="OpenCV", call="cv::resize(..., INTER_AREA)", shrunk=(1.71, 25.0), enlarged=(2.46, 58.0)),
        ResizeCall(library="OpenCV", call="cv::resize(..., INTER_LANCZOS4)", shrunk=(4.23, 77.0), enlarged=(0.36, 7.0)),
        ResizeCall(
            library="sharp",
            call='resize(w, h, {fit: "fill", kernel: "lanczos3", fastShrinkOnLoad: false})',
            shrunk=(0.3, 6.0),
            enlarged=(2.65, 62.0),
        ),
    ),
    "OpenCV's bilinear": (
        ResizeCall(
            library="OpenCV", call="cv::resize(..., INTER_LINEAR), the default", shrunk=(0.0, 0.0), enlarged=(0.0, 0.0)
        ),
        ResizeCall(
            library="OpenVINO",
            call="PrePostProcessor resize(RESIZE_LINEAR) of u8",
            shrunk=(0.12, 1.0),
            enlarged=(0.08, 1.0),
        ),
        ResizeCall(
            library="torchvision",
            call="v2.functional.resize(uint8, [h, w], BILINEAR, antialias=False)",
            shrunk=(0.21, 1.0),
            enlarged=(0.3, 1.0),
        ),
        ResizeCall(
            library="Pillow",
            call="image.resize((w, h), Image.Resampling.BILINEAR)",
            shrunk=(4.1, 65.0),
            enlarged=(0.3, 1.0),
        ),
        ResizeCall(
            library="DALI", call="fn.resize(resize_x=w, resize_y=h, interp_type=INTERP_LINEAR, antialias=False)"
        ),
    ),
}
