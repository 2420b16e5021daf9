"""Hard-Mix before and after: the blocks that the maps rank first, and their replacements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from pmm.data.preprocessing import Crops, Preprocessing
from pmm.models.output import Mix
from pmm.models.pmm import PMM
from pmm.ops.block_ranking import block_ranks, block_scores, clamped, grid
from pmm.utils.errors import InvalidInput
from pmm.visualize.cam import SCALE_WORDS, eval_mode, to_model
from pmm.visualize.heat import heated, resized, scale
from pmm.visualize.sheet import HEIGHT, Group, Panel, sheet, text_size
from pmm.visualize.style import INK

MIN_BLOCK = 22
"""Smallest height in pixels of a block in the picture, so that its rank is legible."""
MIN_FRAME = 6
"""Smallest side in pixels of a block that a frame, two lines of 2 and 1 pixels all around, fits into."""
_GROUPS = (
    Group("", ("crop",)),
    Group("first mix, into stage II", ("CAM of stage I\non F1", "partner", "mixed\nstage II sees this")),
    Group("second mix, into stage III", ("CAM of stage II\non the mixed X", "partner", "mixed\nstage III sees this")),
)


def has_hard_mix(model: nn.Module) -> bool:
    """Whether `mix_picture` can draw it: a PMM, not a method derived from it."""
    return type(model) is PMM


def mix_picture(
    model: nn.Module,
    crops: Crops,
    labels: Sequence[int] | npt.NDArray[np.integer[Any]],
    preprocessing: Preprocessing,
    *,
    names: Sequence[str] = (),
    rows: int = 4,
    seed: int = 0,
    height: int = HEIGHT,
) -> Image.Image:
    """Both Hard-Mixes of a batch, a line for each of its first crops.

    Mode and buffers of the model and torch's generators do not change. Batch-norms use their running statistics here,
    in training those of the batch.

    Args:
        model: a PMM on any device, neither compiled nor wrapped.
        crops: uint8 RGB [N, H, W, 3] at the model's size.
        labels: training label of each crop [N]; partners come from those of another one.
        preprocessing: the model's.
        names: a line per crop [N]; without any, the labels.
        rows: crops that are drawn, at most.
        seed: of the generator that draws the partners.
        height: of a crop in the picture, in pixels; more where ranks could not be read otherwise.

    Returns:
        An RGB picture.

    Raises:
        InvalidInput: a model without a Hard-Mix.
        ValueError: no crop, or not as many labels and names.
    """
    if not has_hard_mix(model):
        raise InvalidInput(f"model is {type(model).__name__}, which has no Hard-Mix", expected="PMM")
    model = cast(PMM, model)
    names = names or [f"label {label}" for label in labels]
    if not len(crops) == len(labels) == len(names) or not len(crops):
        raise ValueError(f"expected as many labels and names as crops: {len(labels)}, {len(names)}, {len(crops)}")
    drawn = [Drawn.of(mix, model) for mix in mixes_of(model, crops, labels, preprocessing, seed)]
    height = max(height, MIN_BLOCK * len(drawn[0].rows))
    size = (max(1, round(height * crops.shape[2] / crops.shape[1])), height)
    lines = []
    for row in range(min(rows, len(crops))):
        line, seen = [Panel(resized(crops[row], size), names[row])], crops[row]
        for mix in drawn:
            partner = int(mix.partner[row])
            # the second map is of what the first mix made
            mapped = heated(seen, mix.cam[row], mix.stride, size, smooth=False)
            seen = mix.pasted(crops, row)
            line += [
                Panel(mix.marked(mapped, crops, row, numbers=True), "" if mix.cam[row].any() else "empty map"),
                Panel(resized(crops[partner], size), names[partner]),
                Panel(mix.marked(resized(seen, size), crops, row, numbers=False)),
            ]
        lines.append(line)
    text = text_size(height)
    return sheet(_GROUPS, lines, notes=[_note(model)], key=Panel(scale(8 * text, text), SCALE_WORDS))


def mixes_of(
    model: PMM, crops: Crops, labels: Sequence[int] | npt.NDArray[Any], preprocessing: Preprocessing, seed: int = 0
) -> tuple[Mix, Mix]:
    """The two mixes of a batch, as `mix_picture` draws them; arguments as there."""
    with eval_mode(model):
        images = to_model(model, crops, preprocessing)
        pids = torch.as_tensor(np.asarray(labels, np.int64), device=images.device)
        generator = torch.Generator(images.device).manual_seed(seed)
        f1 = model.backbone(images)
        return model.mixes(f1, model.bottleneck(f1), f1.mean((2, 3)), pids, generator)


def _note(model: PMM) -> str:
    blocks = f"the {model.k} blocks" if model.k != 1 else "the block"
    return (
        f"Numbers: {blocks} where the map of the true identity is largest, in order. The mix happens on the feature "
        "map X, whose cells there are replaced by the partner's; the crop shows the pixels above those cells. The "
        "second mix starts from the unmixed X again."
    )


class Drawn(NamedTuple):
    """A mix on the host, and the blocks that it ranked."""

    cam: npt.NDArray[np.float32]
    partner: npt.NDArray[np.int64]
    replaced: npt.NDArray[np.bool_]
    ranks: npt.NDArray[np.int64]
    """Rank of each block, from 0 [N, rows, columns]."""
    rows: list[tuple[int, int]]
    """First and last cell (excluded) of each row of blocks."""
    columns: list[tuple[int, int]]
    stride: int
    """Pixels of the crop per cell."""

    @classmethod
    def of(cls, mix: Mix, model: PMM) -> Drawn:
        height, width = mix.cam.shape[1:]
        block = clamped(model.block, height, width)
        rows, columns = grid(height, width, block)
        ranks = block_ranks(block_scores(mix.cam, block)).view(-1, columns, rows).transpose(1, 2)
        return cls(
            cam=mix.cam.cpu().numpy(),
            partner=mix.partner.cpu().numpy(),
            replaced=mix.replaced.cpu().numpy(),
            ranks=ranks.cpu().numpy(),
            rows=[(row * block[0], min((row + 1) * block[0], height)) for row in range(rows)],
            columns=[(column * block[1], min((column + 1) * block[1], width)) for column in range(columns)],
            stride=model.backbone.stride,
        )

    def pasted(self, crops: Crops, row: int) -> Crops:
        """The crop with its partner's pixels above the replaced cells."""
        height, width = crops.shape[1:3]
        above = self.replaced[row].repeat(self.stride, 0).repeat(self.stride, 1)[:height, :width, None]
        return np.where(above, crops[self.partner[row]], crops[row])

    def marked(self, picture: Image.Image, crops: Crops, row: int, *, numbers: bool) -> Image.Image:
        """`picture` of the crop with a frame around each block that was replaced; with `numbers`, all blocks and the
        ranks of those."""
        height, width = crops.shape[1:3]
        pen = ImageDraw.Draw(picture, "RGBA")
        by = self.stride * picture.width / width, self.stride * picture.height / height
        boxes = {
            (i, j): _box(down, right, by, picture.size)
            for i, down in enumerate(self.rows)
            for j, right in enumerate(self.columns)
        }
        taken = {(i, j) for i, j in boxes if self.replaced[row, self.rows[i][0], self.columns[j][0]]}
        if numbers:
            for left, top, right, bottom in boxes.values():
                pen.line((left, top, right, top), (255, 255, 255, 70))
                pen.line((left, top, left, bottom), (255, 255, 255, 70))
        # at the edge of a crop that is no multiple of the stride, too little may be left of a block to draw on
        drawn = [place for place in taken if min(_sides(boxes[place])) >= MIN_FRAME]
        for place in drawn:
            left, top, right, bottom = boxes[place]
            pen.rectangle((left, top, right, bottom), None, "white", 2)
            pen.rectangle((left + 2, top + 2, right - 2, bottom - 2), None, (*INK, 160), 1)
        if numbers:
            for place in drawn:
                _write_rank(pen, boxes[place], int(self.ranks[row][place]) + 1)
        return picture


def _box(
    down: tuple[int, int], right: tuple[int, int], by: tuple[float, float], most: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Cells of `by` pixels of a picture to left, top, right, bottom, the ends included."""
    left, end = (min(round(cell * by[0]), most[0]) for cell in right)
    top, bottom = (min(round(cell * by[1]), most[1]) for cell in down)
    return left, top, end - 1, bottom - 1


def _sides(box: tuple[int, int, int, int]) -> tuple[int, int]:
    left, top, right, bottom = box
    return right - left + 1, bottom - top + 1


def _write_rank(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], rank: int) -> None:
    left, top, right, bottom = box
    size = min(15, round(0.6 * (bottom - top)))
    middle = ((left + right + 1) / 2, (top + bottom + 1) / 2)
    pen.text(middle, str(rank), "white", ImageFont.load_default(size), anchor="mm", stroke_width=2, stroke_fill=INK)
