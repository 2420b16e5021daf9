"""How many coordinates short codes keep: chosen on a sample of the gallery."""

from __future__ import annotations

import numpy as np

from pmm.evaluation.distances import squared_distances
from pmm.evaluation.embedding_matrix import comparable_rows
from pmm.exact_search.codes import Projection, project, quantize
from pmm.exact_search.rotation import Rotation
from pmm.exact_search.scan import NumpyScan
from pmm.utils.arrays import Doubles, Floats

ROWS = 1 << 14
"""Of the sample, that codes are tried on."""
QUERIES = 64
NEIGHBOURS = 10
"""That a search is expected to ask for."""
TERM_BYTES = 16
"""Of a row's codes, beside its coordinates."""
MEASURING = 40
"""Time to measure a row, in that of scanning as many bytes as its float32 numbers take: it lies anywhere."""
LEAST = 16
"""Coordinates; fewer save little."""


def best_rotation(sample: Floats, metric: str, rows: int) -> Rotation:
    """Principal axes of a sample [n, D] of a gallery of so many rows, as many as make the search fastest.

    Bytes to scan grow with the coordinates, rows left to measure fall: how fast is tried, on rows of the sample that
    the axes were not fitted to. Where the spectrum is flat all coordinates are kept, D bytes and the terms.
    """
    dim = sample.shape[1]
    if dim <= LEAST or len(sample) < 2 * QUERIES:
        return Rotation.fit(sample, dim, metric)
    others = sample[1::2]
    axes, others = Rotation.fit(sample[::2], dim, metric), others[:: max(1, len(others) // ROWS)]
    limits = _limits(comparable_rows(others, metric), max(1, NEIGHBOURS * len(others) // max(1, rows)))
    projection = project(axes, others, metric)
    best = min(_choices(dim), key=lambda r: r + TERM_BYTES + 4 * dim * MEASURING * _open_part(projection, limits, r))
    return Rotation.fit(sample, best, metric)


def _choices(dim: int) -> list[int]:
    """16, 24, 32, 48 and so on, and all."""
    powers = [LEAST << power for power in range(dim.bit_length())]
    choices = powers + [3 * power // 2 for power in powers]
    return [*sorted(choice for choice in choices if choice < dim), dim]


def _limits(rows: Doubles, rank: int) -> Doubles:
    """Distances of the first rows to their neighbour of that rank, itself not counted."""
    squares = squared_distances(rows[:QUERIES], rows)
    return np.sqrt(np.maximum(np.partition(squares, min(rank, len(rows) - 1), axis=1)[:, rank], 0))


def _open_part(projection: Projection, limits: Doubles, r: int) -> float:
    """Part of the rows whose lower bounds by `r` coordinates are within the limits of the first rows."""
    some = projection.prefix(r)
    scan = NumpyScan.of([quantize(some)])
    return float((scan.bounds(some.take(slice(0, QUERIES)), slice(0, len(scan))) <= limits[:, None]).mean())
