"""What a search found: the query and its first results in a row, their distances below."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pmm.gallery.index import Index, Neighbours
from pmm.gallery.search import measures_of
from pmm.utils.errors import UserError
from pmm.visualize.lists import ranked_lists

MOST = 20
"""Results that are drawn."""


def draw_neighbours(query: Path, index: Index, found: Neighbours, folder: Path | None = None) -> Image.Image:
    """The image `query` and the first of what was `found` for it [K].

    `folder` is where the indexed crops are now, if they have moved. Raises UserError if one is missing or unreadable.
    """
    place = folder or Path(index.folder)
    crops = [place / index.paths[row] for row in found.indices[:MOST].tolist()]
    gone = [crop for crop in crops if not crop.is_file()]
    if gone:
        raise UserError(
            f"nothing to draw: {len(gone)} of {len(crops)} crops are missing, the first is {gone[0]}; give --folder "
            "DIR if they have moved"
        )
    words = "cosine similarity" if index.contract.embedding.metric == "cosine" else "distance"
    captions = [measures_of(index, found)[:MOST]]
    return ranked_lists([query], [[(crop, None) for crop in crops]], height=192, captions=captions, measure=words)
