"""Which cells of a crop a model takes for which part, and what hurts it when it is hidden."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from pmm.data.preprocessing import Crops
from pmm.data.windows import Windows
from pmm.visualize.cam import shown_size
from pmm.visualize.heat import LUMA, heated, resized, scale
from pmm.visualize.sheet import HEIGHT, Group, Panel, sheet, text_size
from pmm.visualize.style import LINES

Floats = npt.NDArray[np.floating]
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
    names: Sequence[str], crops: Crops, drops: Sequence[Floats], windows: Windows, *, height: int = HEIGHT
) -> Image.Image:
    """A row per crop: the crop, and over it how much of the probability of its identity is lost where a window hides
    it.

    Args:
        names, crops, height: as for `parts_picture`.
        drops: for each crop [rows, columns], of `windows`, in 0..1.
    """
    size = shown_size(crops, height)
    rows = []
    for name, crop, drop in zip(names, crops, drops, strict=True):
        spread = _spread(drop, windows)
        hidden, worst = crop.copy(), "nothing hurts"
        if drop.any():
            top, left, bottom, right = windows.rectangles()[int(drop.argmax())]
            hidden[top:bottom, left:right] = 0
            worst = f"{drop.max():.1%} lost" if drop.max() >= 0.0005 else "under 0.1% lost"
        rows.append([
            Panel(resized(crop, size), name), Panel(heated(crop, spread, 1, size)), Panel(resized(hidden, size), worst),
        ])  # fmt: skip
    text = text_size(height)
    notes = [
        f"Training crops. Windows of {windows.side}x{windows.side} pixels, every {windows.step}: the probability of "
        "the true identity that is lost behind each, averaged over the windows of a pixel; at the right the worst one."
    ]
    key = Panel(scale(8 * text, text), "0 to the largest of each crop")
    return sheet([Group("", ("crop", "what hurts if hidden", "the worst window"))], rows, notes=notes, key=key)


def _spread(drops: Floats, windows: Windows) -> Floats:
    """Drops [rows, columns] -> their means over the windows that cover each pixel [H, W]; 0 where none does."""
    total, count = (np.zeros((windows.height, windows.width)) for _ in range(2))
    for (top, left, bottom, right), drop in zip(windows.rectangles(), drops.ravel(), strict=True):
        total[top:bottom, left:right] += drop
        count[top:bottom, left:right] += 1
    return total / np.maximum(count, 1)


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
