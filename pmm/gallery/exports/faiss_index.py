"""A gallery to an index file of faiss, and a table that says which crop each of its numbers is. Loads no torch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pmm.gallery.exports.batches import row_batches
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import CannotWrite, InvalidInput, reason_of
from pmm.utils.extras import import_library
from pmm.utils.files import replacing

FaissKind = Literal["flat", "ivf-sq8"]
CROPS_PER_LIST = 39
"""faiss's k-means asks for so many of each list at least."""
MAX_CROPS_PER_LIST = 64
"""It would take up to 256, all of a large gallery, for hardly better lists."""
ROUNDS = 10
"""Of k-means, as faiss trains its own inverted lists."""
PROBED = 16
"""One list in so many is looked at."""


def export_faiss(gallery: Gallery, out: Path, kind: FaissKind = "flat") -> Path:
    """Write the index to `out` and the table beside it; returns the table's path.

    Ids that are whole numbers from 0 on are faiss's ids too; else these number the crops, in order. Of a cosine gallery
    faiss has embeddings at norm 1 and gives inner products, 1 - distance; else it gives squared distances.

    Args:
        kind: flat is exact; ivf-sq8 stores a byte per dimension and looks into one list in 16 (nprobe, which can be
            changed in the index), so that it may miss crops.

    Either both files are new afterwards or none is.

    Raises MissingLibrary without faiss, InvalidFile for an empty gallery, InvalidInput for one with too few crops,
    CannotWrite where the disk is full.
    """
    faiss = import_library("faiss")
    index = _flat(faiss, gallery) if kind == "flat" else _inverted(faiss, gallery)
    table = out.with_name(f"{out.name}.csv")
    own = gallery.manifest.ids == "int64" and bool((gallery.column("id") >= 0).all())
    batches = row_batches(gallery, unit=True)
    with replacing(table) as new_table, replacing(out) as new_index:
        # names on disk that are no UTF-8 are written as the bytes that they are
        with new_table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["faiss_id", "id", *gallery.columns])
            for batch in batches:
                ids = batch.columns["id"].astype(np.int64) if own else batch.start + np.arange(len(batch.embeddings))
                index.add_with_ids(batch.embeddings, ids)
                columns = (values.tolist() for values in batch.columns.values())
                writer.writerows(zip(ids.tolist(), *columns, strict=True))
        try:
            faiss.write_index(index, str(new_index))
        except RuntimeError as error:
            raise CannotWrite(f"faiss: {reason_of(error)}", path=out) from error
    return table


def _flat(faiss: Any, gallery: Gallery) -> Any:
    kind = faiss.IndexFlatIP if gallery.metric == "cosine" else faiss.IndexFlatL2
    return faiss.IndexIDMap2(kind(gallery.dim))


def _inverted(faiss: Any, gallery: Gallery) -> Any:
    """Trained: its lists by k-means on some crops, its bytes on the range of all."""
    lists = min(int(4 * len(gallery) ** 0.5), len(gallery) // CROPS_PER_LIST)
    if lists < 1:
        problem = f"{len(gallery)} crops are too few to train ivf-sq8"
        raise InvalidInput(problem, path=gallery.path, expected=f"{CROPS_PER_LIST} or more", hint="flat is exact")
    low, high = np.full(gallery.dim, np.inf, np.float32), np.full(gallery.dim, -np.inf, np.float32)
    every = max(1, len(gallery) // (lists * MAX_CROPS_PER_LIST))
    some = []
    for batch in row_batches(gallery, unit=True):
        low, high = np.minimum(low, batch.embeddings.min(0)), np.maximum(high, batch.embeddings.max(0))
        some.append(batch.embeddings[-batch.start % every :: every])
    sample = np.concatenate(some)
    metric = faiss.METRIC_INNER_PRODUCT if gallery.metric == "cosine" else faiss.METRIC_L2
    quantizer = (faiss.IndexFlatIP if gallery.metric == "cosine" else faiss.IndexFlatL2)(gallery.dim)
    clustering = faiss.Clustering(gallery.dim, lists)
    clustering.niter = ROUNDS
    clustering.train(sample, quantizer)
    # not of the residuals, whose range no sample tells: faiss clips what lies outside
    index = faiss.IndexIVFScalarQuantizer(quantizer, gallery.dim, lists, faiss.ScalarQuantizer.QT_8bit, metric, False)
    index.train(np.stack([low, high]))
    index.nprobe = max(1, lists // PROBED)
    return index
