"""Which part of a crop a model needs: its certainty of the true identity while a window hides a part, window by window;
and the windows that AOS draws by it (Huang, Li, Zhang, Chen, Huang; CVPR 2018). Loads no torch.

The table has every training image as it is and mirrored: the windows do not reach the last columns of a crop, so that
the table of a mirrored crop is not the mirrored table.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pmm.data.samples import Sample
from pmm.data.windows import Windows
from pmm.recipe import RecipeConfig
from pmm.utils.arrays import Doubles, Ints
from pmm.utils.errors import InvalidFile
from pmm.utils.files import existing_file, write_file
from pmm.utils.from_dict import from_dict

TABLE = "occlusions.npz"
"""Name of the file in a run's folder."""
FORMAT = "pmm-occlusions-1"
EXPECTED = "a table of occlusions, as pmm train --method aos writes it"
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a file that is none of its own."""
AGAIN = "move it away: the run makes it anew when it goes on with --resume"


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What a table is of."""

    format: str
    checkpoint: str
    """SHA-256 of the checkpoint that was asked."""
    windows: Windows
    images: tuple[str, ...]
    """Paths in the data set, as `image_names` has them."""
    left_out: tuple[str, ...] = ()
    """Those that could not be read. Nothing hurts them."""


@dataclass(frozen=True, kw_only=True)
class OcclusionTable:
    """How certain a model is of each training image's identity, whole and behind each window."""

    facts: TableFacts
    whole: npt.NDArray[np.float32]
    """Logarithm of the probability of the true identity [images, 2]: as it is, and mirrored. In it 1 - p is exact too
    where p rounds to 1."""
    behind: npt.NDArray[np.float32]
    """The same behind each window [images, 2, rows, columns], of windows."""
    rows: Mapping[str, int] = field(init=False, repr=False, compare=False)
    """Image -> its place in the arrays."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", {image: row for row, image in enumerate(self.facts.images)})

    @property
    def windows(self) -> Windows:
        """Those that were tried."""
        return self.facts.windows

    def probabilities(self, image: str, mirrored: bool) -> Doubles:
        """p of the true identity behind each window [rows, columns]."""
        return np.exp(self.behind[self.rows[image], int(mirrored)].astype(np.float64))

    def certainty(self, image: str, mirrored: bool) -> float:
        """p of the true identity where nothing is hidden."""
        return math.exp(self.whole[self.rows[image], int(mirrored)])

    def drops(self, image: str, mirrored: bool) -> Doubles:
        """How much each window hurts [rows, columns]: p of the whole crop - p behind the window, 0 where that is less.

        `image` is one of `facts.images`; the grid is that of `windows`.
        """
        return np.maximum(self.losses([self.rows[image]], [mirrored])[0], 0)

    def losses(self, rows: Sequence[int] | Ints, mirrored: Sequence[bool] | npt.NDArray[np.bool_]) -> Doubles:
        """p of the whole crop - p behind each window [B, rows, columns], below 0 where the window helps, of the images
        in those places of the arrays."""
        place = np.asarray(rows, dtype=np.int64), np.asarray(mirrored).astype(np.int64)
        whole, behind = self.whole[place].astype(np.float64), self.behind[place].astype(np.float64)
        return np.expm1(whole)[:, None, None] - np.expm1(behind)


def image_names(samples: Sequence[Sample], root: Path) -> tuple[str, ...]:
    """How a table names images: by their paths in the data set at `root`, which may move."""
    paths = (sample.path for sample in samples)
    return tuple((path.relative_to(root) if path.is_relative_to(root) else path).as_posix() for path in paths)


def write_table(path: Path, table: OcclusionTable) -> None:
    """Write `table` whole or not at all; the same table is the same bytes. Raises CannotWrite."""
    facts = np.frombuffer(json.dumps(dataclasses.asdict(table.facts)).encode("ascii"), np.uint8)
    content = io.BytesIO()
    np.savez(content, facts=facts, whole=table.whole, behind=table.behind)
    write_file(path, content.getvalue())


def read_table(path: str | Path) -> OcclusionTable:
    """The table at `path`. Raises InvalidFile if it is missing, damaged, or of another kind."""
    path = existing_file(path, EXPECTED)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = from_dict(TableFacts, json.loads(arrays["facts"].tobytes()))
            whole, behind = arrays["whole"], arrays["behind"]
        _check_arrays(facts, whole, behind)
    except _DAMAGED as error:
        problem = f"truncated, damaged, or no table of occlusions ({' '.join(str(error).split())[:120]})"
        raise InvalidFile(problem, path=path, expected=EXPECTED, hint=AGAIN) from error
    return OcclusionTable(facts=facts, whole=whole, behind=behind)


def _check_arrays(facts: TableFacts, whole: npt.NDArray[np.float32], behind: npt.NDArray[np.float32]) -> None:
    """Raises ValueError."""
    if facts.format != FORMAT:
        raise ValueError(f"its format is {facts.format!r}, not {FORMAT!r}")
    count, windows = len(facts.images), facts.windows
    shapes = (count, 2), (count, 2, len(windows.tops), len(windows.lefts))
    for array, shape in zip((whole, behind), shapes, strict=True):
        if array.dtype != np.float32 or array.shape != shape:
            raise ValueError(f"an array is {array.dtype} {list(array.shape)}, not float32 {list(shape)}")
        if not (array <= 0).all():  # nor is NaN
            raise ValueError("an array holds what is no logarithm of a probability")


def check_table(
    table: OcclusionTable, path: Path, *, checkpoint: str, windows: Windows, images: Collection[str]
) -> None:
    """Raises InvalidFile for a `table`, read from `path`, of another checkpoint (SHA-256), of other windows, or without
    some of `images`."""
    facts = table.facts

    def refuse(problem: str, expected: str) -> None:
        raise InvalidFile(problem, path=path, expected=expected, hint=AGAIN)

    if facts.windows != windows:
        refuse(f"a table of {_described(facts.windows)}", _described(windows))
    if missing := [image for image in images if image not in table.rows]:
        refuse(f"a table of another data set, without {missing[0]}", f"the {len(images):,} training images of this run")
    if facts.checkpoint != checkpoint:
        refuse(f"a table of another checkpoint (SHA-256 {facts.checkpoint[:12]})", f"that of {checkpoint[:12]}")


def _described(windows: Windows) -> str:
    return f"windows every {windows.step} pixels on {windows.height}x{windows.width} crops"


class Occluder:
    """Draws what is hidden of training crops.

    A crop is occluded with the recipe's `aos_share`; by `sampling` the window is drawn in proportion to how much it
    hurts, by `hard-1` it is the one that hurts most, by `no-adversary` least, and `random` is a square anywhere. How
    much it hurts is averaged over each window and its neighbours; of a table without a window that hurts any may come.
    """

    def __init__(
        self, windows: Windows, table: OcclusionTable | None, images: Sequence[str], recipe: RecipeConfig
    ) -> None:
        """`images` are those whose indices are given to `cutouts`; only `random` needs no `table`."""
        self.windows, self.table, self.pick, self.share = windows, table, recipe.aos_pick, recipe.aos_share
        self.rows = np.array([table.rows[image] for image in images] if table else [], np.int64)
        self.rectangles = windows.rectangles()

    def cutouts(self, indices: Ints, mirrored: npt.NDArray[np.bool_], chances: Doubles) -> Ints:
        """[B, 4]: top, left, bottom, right of the window that hides a part of each crop, mirrored or not, the ends
        excluded; all 0 for none. One number `chances` [B], uniform in 0..1, decides on each crop."""
        found = np.zeros((len(indices), 4), np.int64)
        hidden = np.flatnonzero(chances < self.share)
        if len(hidden):
            again = chances[hidden] / self.share  # uniform in 0..1 too
            found[hidden] = (
                self._anywhere(again)
                if self.pick == "random"
                else self.rectangles[inverted(self._weights(self.rows[indices[hidden]], mirrored[hidden]), again)]
            )
        return found

    def _weights(self, rows: Ints, mirrored: npt.NDArray[np.bool_]) -> Doubles:
        """[B, W], in proportion to which windows are drawn."""
        assert self.table is not None
        losses = self.table.losses(rows, mirrored)
        if self.pick == "sampling":
            return blurred(np.maximum(losses, 0)).reshape(len(rows), -1)
        # without the limit of 0, below which many windows would be the least
        order = blurred(losses if self.pick == "hard-1" else -losses).reshape(len(rows), -1)
        return (order == order.max(1, keepdims=True)).astype(np.float64)

    def _anywhere(self, chances: Doubles) -> Ints:
        windows = self.windows
        columns = windows.width - windows.side + 1
        places = (windows.height - windows.side + 1) * columns
        top, left = np.divmod(np.minimum((chances * places).astype(np.int64), places - 1), columns)
        return np.stack([top, left, top + windows.side, left + windows.side], 1)


def blurred(grids: Doubles) -> Doubles:
    """Means of 3x3 cells of [B, rows, columns]; beyond the border it is reflected, the border itself not repeated."""
    rows, columns = (_reflected(size) for size in grids.shape[1:])
    padded = grids[:, rows][:, :, columns]
    height, width = grids.shape[1:]
    parts = [padded[:, down : down + height, right : right + width] for down in range(3) for right in range(3)]
    return np.sum(parts, axis=0) / 9


def _reflected(size: int) -> list[int]:
    """The cells of a row of `size`, and one more at each end."""
    return [min(1, size - 1), *range(size), max(size - 2, 0)]


def inverted(weights: Doubles, chances: Doubles) -> Ints:
    """Indices [B], drawn in proportion to `weights` [B, W] by one number `chances` [B] each, uniform in 0..1; of
    weights that are all 0, as if they were equal."""
    weights = np.where(weights.any(1, keepdims=True), weights, 1)
    sums = weights.cumsum(1)
    ends = sums[:, -1]
    target = np.minimum(chances * ends, np.nextafter(ends, 0))  # a product may round up to the end
    return (sums <= target[:, None]).sum(1)
