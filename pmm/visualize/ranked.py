"""Ranked lists of a whole test set: the queries to show, and what one model, or two, find for them. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pmm.data.samples import ReidDataset
from pmm.evaluation.parity.labels import Ints, QueryGallery
from pmm.evaluation.parity.ranking import first_items
from pmm.gallery.ranking import labels_of
from pmm.visualize.lists import compared_lists, ranked_lists

Scores = npt.NDArray[np.float64]
ENDS = 0.05
"""Share of the queries left out at each end: the very hardest and easiest say least of a model."""


def ranked_picture(
    split: ReidDataset, embedded: QueryGallery, scores: Scores, *, queries: int = 6, items: int = 9
) -> Image.Image:
    """A few queries from the hardest to the easiest, with what ranks first for them.

    `scores` is the average precision of each query [Q], NaN for one without a match. Raises UserError if a crop cannot
    be read.
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
    """A few queries from the one that lost most to the one that gained most, with what two models rank first for them.

    Both models come with their average precision per query, as in `ranked_picture`. Raises UserError if a crop cannot
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
    """Up to `count` indices of `scores` [Q], evenly spread from the lowest to the highest; none of a NaN."""
    order = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]
    last = len(order) - 1
    return order[np.linspace(ends * last, (1 - ends) * last, min(count, len(order))).round().astype(int)]


def rows(split: ReidDataset, embedded: QueryGallery, queries: Ints, items: int) -> list[list[tuple[Path, bool | None]]]:
    """What ranks first for some queries, without junk: path, and whether it is the same person."""
    found = first_items(embedded, labels_of(split), queries, items)
    return [
        [(split.gallery[item].path, split.gallery[item].pid == split.query[query].pid) for item in row if item >= 0]
        for query, row in zip(queries.tolist(), found.tolist(), strict=True)
    ]


def _paths(split: ReidDataset, queries: Sequence[int] | Ints) -> list[Path]:
    return [split.query[query].path for query in queries]
