"""A gallery's threshold from the people whom one of its cameras sees at once. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.evaluation.camera_threshold import CameraThreshold, SeenAtOnce, camera_threshold, pairs_seen_at_once
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.gallery.embed_job import FILE_COLUMNS
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.thresholds import Threshold
from pmm.utils.arrays import Doubles
from pmm.utils.errors import InvalidFile, InvalidValue

PAIRS_AT_ONCE = 1 << 15


def threshold_from_cameras(
    gallery: Gallery,
    fmr: float,
    *,
    stretch: float,
    confidence: float = 0.95,
    same_time: float = 0.0,
    people: str = "",
) -> CameraThreshold:
    """See `pmm.evaluation.camera_threshold`; `people` is the column that names people or their tracks, if there is one.

    Crops without a time (NaN), a camera or, with `people`, a name (empty, NaN, or -1 as data sets mark junk) are left
    out.

    Raises InvalidFile for a gallery without cameras and times or without crops that one camera saw at once,
    InvalidValue for a column or a number that cannot be.
    """
    for name in ("camera", "time"):
        if name not in gallery.columns:
            raise InvalidFile(
                f"it has no column {name}", path=gallery.path,
                hint="embed the crops again with --names or --metadata, which tell each crop's camera and time",
            )  # fmt: skip
    no_names = {"camera", "time", "path", *FILE_COLUMNS}
    if people and (people not in gallery.columns or people in no_names):
        others = sorted(set(gallery.columns) - no_names)
        raise InvalidValue("--people", people, choices=others or ["no column: it has none that could name people"])
    rows = gallery.rows
    cameras, times = gallery.column("camera", rows), np.asarray(gallery.column("time", rows), np.float64)
    names = gallery.column(people, rows) if people else None
    keep = np.isfinite(times) & _named(cameras)
    if names is not None:
        keep &= _named(names) if names.dtype == object else _named(names) & (names != -1)
        names = names[keep]
        if len(names) > 1 and len(np.unique(names)) == len(names):
            raise InvalidValue("--people", people, "a column in which the crops of one person have one name")
    rows = rows[keep]
    seen = pairs_seen_at_once(cameras[keep], times[keep], stretch=stretch, same_time=same_time, person=names)
    if not seen.stretches:
        raise InvalidFile(
            f"no two people are seen at once by one of its cameras, of {len(rows):,} crops with a time",
            path=gallery.path, hint="give --same-time, if no two crops have exactly one time",
        )  # fmt: skip
    seen = seen._replace(first=rows[seen.first], second=rows[seen.second])
    return camera_threshold(_distances(gallery, seen), seen, fmr, confidence=confidence)


def _named(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which are not empty and not NaN."""
    return values != "" if values.dtype == object else ~np.isnan(values)


def _distances(gallery: Gallery, seen: SeenAtOnce) -> Doubles:
    """Of the pairs [P], as the gallery gives them."""
    out = np.empty(len(seen.first))
    order = np.argsort(seen.first, kind="stable")  # so that few rows are read for many pairs
    for start in range(0, len(out), PAIRS_AT_ONCE):
        some = order[start : start + PAIRS_AT_ONCE]
        rows, places = np.unique(np.stack([seen.first[some], seen.second[some]]), return_inverse=True)
        first, second = places.reshape(2, -1)
        matrix = EmbeddingMatrix(gallery.embeddings(rows), metric=gallery.metric)
        between = EmbeddingDistances(matrix, matrix)
        halves = between.exact_pairs(first, second)
        out[some] = halves if gallery.metric == "cosine" else np.sqrt(2 * halves * between.factor)
    return out


def put_thresholds(gallery: Gallery, thresholds: Sequence[Threshold]) -> list[Threshold]:
    """Add these to the gallery's, in place of those for the same false match rates, which are returned."""
    with gallery.writer():
        gone = [each for each in gallery.thresholds if any(each.is_for(new.fmr) for new in thresholds)]
        gallery.set_thresholds([*(each for each in gallery.thresholds if each not in gone), *thresholds])
    return gone
