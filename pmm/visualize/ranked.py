"""Ranked lists: of a test set by one model or by two, and of a search in a gallery. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pmm.data.samples import ReidDataset
from pmm.evaluation.parity.labels import QueryGallery
from pmm.evaluation.parity.ranking import first_items
from pmm.evaluation.ranking import labels_of
from pmm.utils.arrays import Ints
from pmm.utils.errors import InvalidFile
from pmm.visualize.lists import compared_lists, ranked_lists

Scores = npt.NDArray[np.float64]
ENDS = 0.05
"""Share of the queries left out at each end: the hardest and the easiest say least about a model."""
MAX_FOUND = 20
"""Results of a search in its picture."""
MAX_QUERIES = 20
"""Of a search in its picture."""


def ranked_picture(
    split: ReidDataset, embedded: QueryGallery, scores: Scores, *, queries: int = 6, items: int = 9
) -> Image.Image:
    """A few queries from the hardest to the easiest, with the first items of their rankings.

    `scores` is the average precision of each query [Q], NaN for one without a match. Raises InvalidFile if a crop
    cannot be read.
    """
    chosen = spread(scores, queries)
    titles = [f"AP {scores[query]:.0%}" for query in chosen]
    return ranked_lists(_paths(split, chosen), rows(split, embedded, chosen, items), titles=titles)


def compared_picture(
    split: ReidDataset,
    before: tuple[QueryGallery, Scores],
    after: tuple[QueryGallery, Scores],
    *,
    heads: tuple[str, str],
    queries: int = 6,
    items: int = 5,
) -> Image.Image:
    """A few queries from the one that lost most to the one that gained most, with the first items by two models.

    Both models come with their average precision per query, as in `ranked_picture`. Raises InvalidFile if a crop cannot
    be read.
    """
    (first, old), (second, new) = before, after
    chosen = spread(new - old, queries, ends=0)
    return compared_lists(
        _paths(split, chosen),
        rows(split, first, chosen, items),
        rows(split, second, chosen, items),
        heads=heads,
        titles=[f"AP {old[query]:.0%} -> {new[query]:.0%}" for query in chosen],
        height=128,
    )


def spread(scores: Scores, count: int, ends: float = ENDS) -> Ints:
    """Up to `count` indices of `scores` [Q], evenly spread from the lowest to the highest; NaN left out."""
    order = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]
    last = len(order) - 1
    return order[np.linspace(ends * last, (1 - ends) * last, min(count, len(order))).round().astype(int)]


def rows(split: ReidDataset, embedded: QueryGallery, queries: Ints, items: int) -> list[list[tuple[Path, bool | None]]]:
    """The first items for some queries, without junk: path, and whether it is the same person."""
    first = first_items(embedded, labels_of(split), queries, items)
    return [
        [(split.gallery[item].path, split.gallery[item].pid == split.query[query].pid) for item in row if item >= 0]
        for query, row in zip(queries.tolist(), first.tolist(), strict=True)
    ]


def found_picture(
    queries: Sequence[Path], rows: Sequence[Sequence[Path]], distances: Sequence[Sequence[float]]
) -> Image.Image:
    """A line per query: its image, and the crops that a search found in a row, their distances below; the first 20 of
    each at most.

    Raises InvalidFile if a crop is missing or unreadable.
    """
    rows = [row[:MAX_FOUND] for row in rows]
    crops = [crop for row in rows for crop in row]
    missing = [crop for crop in crops if not crop.is_file()]
    if missing:
        problem = f"missing, as {len(missing)} of the {len(crops)} crops to draw"
        raise InvalidFile(
            problem,
            path=missing[0],
            hint="if they were moved, give --folder FOLDER, or record it with pmm embed --append",
        )
    captions = [[f"{distance:.4f}" for distance in line[:MAX_FOUND]] for line in distances]
    lines: list[list[tuple[Path, bool | None]]] = [[(crop, None) for crop in row] for row in rows]
    return ranked_lists(queries, lines, height=192, captions=captions, measure="distance")


def _paths(split: ReidDataset, queries: Sequence[int] | Ints) -> list[Path]:
    return [split.query[query].path for query in queries]
