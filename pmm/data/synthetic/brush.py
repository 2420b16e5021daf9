"""What figures and scenes are painted with: shades, rounded bars, and the patterns of cloth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image, ImageDraw

from pmm.data.synthetic.identity import RGB

Point = tuple[float, float]
Item = TypeVar("Item")


class Brush:
    """Paints parts of one figure on its RGBA layer. Positions in pixels, sizes in shares of the figure's height."""

    def __init__(self, layer: Image.Image, cloth: Image.Image, height: float) -> None:
        self.layer = layer
        self.cloth = cloth
        self.height = height
        self.draw = ImageDraw.Draw(layer)

    def disc(self, centre: Point, rx: float, ry: float, colour: RGB) -> None:
        """An ellipse with half axes `rx` and `ry`."""
        u, v = centre
        rx, ry = rx * self.height, ry * self.height
        self.draw.ellipse((u - rx, v - ry, u + rx, v + ry), fill=colour)

    def limb(self, points: Sequence[Point], radii: Sequence[float], colour: RGB, cloth: bool = False) -> None:
        """A chain of tapered, rounded bars with a dark rim, so that it stands out from a body of the same colour."""
        bars(self.draw, points, [radius * self.height + 1.2 for radius in radii], shade(colour, 0.7))
        inner = [radius * self.height for radius in radii]
        if cloth:
            self.cut_out(lambda draw: bars(draw, points, inner, 255))
        else:
            bars(self.draw, points, inner, colour)

    def cut_out(self, shape: Callable[[ImageDraw.ImageDraw], None]) -> None:
        """Fill what `shape` paints (with 255) with the cloth of the upper garment."""
        mask = Image.new("L", self.layer.size, 0)
        shape(ImageDraw.Draw(mask))
        box = mask.getbbox()
        if box is not None:
            self.layer.paste(self.cloth.crop(box), box, mask.crop(box))


def weave(size: tuple[int, int], pattern: str, colour: RGB, second: RGB, middle: Point, unit: float) -> Image.Image:
    """A cloth (RGB) of `size` with one of the patterns, hung up at `middle`; `unit` is the width of a stripe.

    It covers 9 units around the middle: a torso with its arms.
    """
    cloth = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(cloth)
    centre, chest = middle
    left, right, top, bottom = centre - 9 * unit, centre + 9 * unit, chest - 9 * unit, chest + 9 * unit
    steps = range(-9, 10)
    match pattern:
        case "horizontal":
            for k in steps:
                draw.rectangle((left, chest + (2 * k - 0.5) * unit, right, chest + (2 * k + 0.5) * unit), fill=second)
        case "vertical":
            for k in steps:
                x = centre + 1.7 * k * unit
                draw.rectangle((x - 0.42 * unit, top, x + 0.42 * unit, bottom), fill=second)
        case "check":
            side = 1.35 * unit
            for k in steps:
                for row in range(-7, 8):
                    if (k + row) % 2:
                        x, y = centre + (k - 0.5) * side, chest + row * side
                        draw.rectangle((x, y, x + side, y + side), fill=second)
        case "dots":
            for k in steps:
                for row in range(-7, 8):
                    x, y = centre + (1.8 * k + 0.9 * (row % 2)) * unit, chest + 1.4 * row * unit
                    draw.ellipse((x - 0.55 * unit, y - 0.55 * unit, x + 0.55 * unit, y + 0.55 * unit), fill=second)
        case "diagonal":
            for k in steps:
                x = centre + 2.6 * k * unit
                ends = (x - 9 * unit, bottom, x + 9 * unit, top)
                draw.line(ends, fill=second, width=max(1, round(0.95 * unit)))
        case "yoke":
            draw.rectangle((left, top, right, chest - 1.2 * unit), fill=second)
    return cloth


def bars(draw: ImageDraw.ImageDraw, points: Sequence[Point], radii: Sequence[float], fill: RGB | int) -> None:
    """Discs at the points, joined by bars whose width runs from one disc to the next; radii in pixels."""
    for (u, v), radius in zip(points, radii, strict=True):
        draw.ellipse((u - radius, v - radius, u + radius, v + radius), fill=fill)
    for ((u0, v0), (u1, v1)), (r0, r1) in zip(pairs(points), pairs(radii), strict=True):
        length = math.hypot(u1 - u0, v1 - v0)
        if length < 1e-6:
            continue
        x, y = (v0 - v1) / length, (u1 - u0) / length
        corners = [
            (u0 + x * r0, v0 + y * r0),
            (u1 + x * r1, v1 + y * r1),
            (u1 - x * r1, v1 - y * r1),
            (u0 - x * r0, v0 - y * r0),
        ]
        draw.polygon(corners, fill=fill)


def pairs(items: Sequence[Item]) -> list[tuple[Item, Item]]:
    """Neighbours: (first, second), (second, third), ..."""
    return list(itertools.pairwise(items))


def shade(colour: RGB, factor: float) -> RGB:
    """`colour` made lighter (factor above 1) or darker."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


def contrast(colour: RGB) -> RGB:
    """A band colour on `colour`: lighter on dark cloth, darker on light cloth."""
    if sum(colour) < 330:
        return shade((colour[0] + 70, colour[1] + 70, colour[2] + 70), 1.15)
    return shade(colour, 0.58)
