"""Which cells of a crop a model takes for which part, and what hurts it when it is hidden."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pmm.data.preprocessing import Crops
from pmm.data.windows import Windows
from pmm.utils.arrays import Floats
from pmm.visualize.cam import shown_size
from pmm.visualize.heat import LUMA, heated, resized, scale
from pmm.visualize.sheet import HEIGHT, Group, Panel, sheet, text_size
from pmm.visualize.style import LINES

SHADE = 0.55
"""Share of a part's colour over the crop."""


def parts_picture(
    names: Sequence[str], crops: Crops, shares: Floats, stride: int, *, height: int = HEIGHT
) -> Image.Image:
    """A row per crop: the crop, its cells in the colour of the part that has most of each, and each part's share.

    Args:
        names: a line per crop.
        crops: uint8 [N, H, W, 3], as the model sees them.
        shares: [N, p, h, w], of each cell, add up to 1.
        stride: pixels of the crop per cell.
        height: of a crop in pixels.
    """
    count = shares.shape[1]
    size = shown_size(crops, height)
    groups = [Group("", ("crop", "parts", *(f"part {part + 1}" for part in range(count))))]
    rows = [
        [
            Panel(resized(crop, size), name),
            Panel(_painted(crop, share, stride, size)),
            *(
                Panel(heated(crop, part, stride, size, smooth=False), f"{part.mean():.0%} of the cells")
                for part in share
            ),
        ]
        for name, crop, share in zip(names, crops, shares, strict=True)
    ]
    key = Panel(_key(count, text_size(height)), f"parts 1 to {count}, whichever has most of a cell")
    notes = ["Each cell of the map belongs to each part by a share; at the right, the shares of each part alone."]
    return sheet(groups, rows, notes=notes, key=key)


def occlusion_picture(
    names: Sequence[str],
    crops: Crops,
    certainties: Sequence[float],
    drops: Sequence[Floats],
    windows: Windows,
    *,
    height: int = HEIGHT,
) -> Image.Image:
    """A row per crop: the crop, over it how much of the probability of its identity a window there costs, and the
    window that costs most.

    Args:
        names, crops, height: as for `parts_picture`.
        certainties: of each crop, the probability of its identity where nothing is hidden.
        drops: for each crop what is lost of it [rows, columns], of `windows`, in 0..1.
    """
    size = shown_size(crops, height)
    rows = []
    for name, crop, certainty, drop in zip(names, crops, certainties, drops, strict=True):
        hidden, worst = crop.copy(), "no window hurts"
        if drop.any():
            top, left, bottom, right = windows.rectangles()[int(drop.argmax())]
            hidden[top:bottom, left:right] = 0
            worst = f"this hidden: {certainty - drop.max():.1%}"
        heat = heated(crop, _at_centres(drop, windows), 1, size)
        panels = (resized(crop, size), name), (heat, f"nothing hidden: {certainty:.1%}"), (resized(hidden, size), worst)
        rows.append([Panel(*panel) for panel in panels])
    text = text_size(height)
    notes = [
        f"Training crops, and the probability of the true identity. Windows of {windows.side}x{windows.side} pixels "
        f"hide a part, one every {windows.step} pixels: bright is where the centres of those lie that cost most of it. "
        "The model is that of the first training, the table what the second one is occluded by."
    ]
    key = Panel(scale(8 * text, text), "nothing to the largest loss of each crop")
    heads = ("crop", "where hiding hurts", "the worst window")
    return sheet([Group("", heads)], rows, notes=notes, key=key)


def _at_centres(drops: Floats, windows: Windows) -> Floats:
    """Drops [rows, columns] -> [H, W], each where the centre of its window lies; 0 where there is none."""
    rows, columns = drops.shape
    begin, step = windows.side // 2 - windows.step // 2, windows.step
    grid = Image.fromarray(np.asarray(drops, np.float32)).resize(
        (columns * step, rows * step), Image.Resampling.BILINEAR
    )
    whole = np.zeros((windows.height, windows.width), np.float32)
    first = max(0, begin)
    part = np.asarray(grid)[first - begin :, first - begin :][: windows.height - first, : windows.width - first]
    whole[first : first + part.shape[0], first : first + part.shape[1]] = part
    return whole


def _painted(crop: Crops, shares: Floats, stride: int, size: tuple[int, int]) -> Image.Image:
    """The crop in grey under the colours of the parts [p, h, w]."""
    shown = np.asarray(resized(crop, size), np.float32)
    grey = (shown @ np.array(LUMA, np.float32))[..., None]
    largest = shares.argmax(0)
    rows, columns = (
        np.minimum(np.arange(shown) * pixels // shown // stride, cells - 1)
        for shown, pixels, cells in zip(size[::-1], crop.shape[:2], largest.shape, strict=True)
    )
    part_of = largest[rows[:, None], columns[None]]
    colours = np.array([_colour(part) for part in range(len(shares))], np.float32)[part_of]
    return Image.fromarray((grey * (1 - SHADE) + colours * SHADE).round().clip(0, 255).astype(np.uint8))


def _key(count: int, text: int) -> Image.Image:
    """A square of each colour."""
    bars = np.concatenate([np.full((text, 2 * text, 3), _colour(part), np.uint8) for part in range(count)], 1)
    return Image.fromarray(bars)


def _colour(part: int) -> tuple[int, ...]:
    code = LINES[part % len(LINES)]
    return tuple(int(code[place : place + 2], 16) for place in (1, 3, 5))
