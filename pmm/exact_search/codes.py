"""Short codes of embeddings, and how far they are from what they stand for. Never too little, whatever is rounded.

With U the orthonormal matrix nearest to a rotation's basis and z = row - mean, a row is mapped to r + 1 numbers,
f = (U^T z, |z - U U^T z|). A projection lengthens nothing, and rests obey the triangle inequality, so |q - x| >=
|f(q) - f(x)|. What is stored of f(x) is wrong by at most `error` e, so |q - x| >= |stored q - stored x| - e_q - e_x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.evaluation.embedding_matrix import MAX_ROWS, comparable_rows
from pmm.exact_search.rotation import UNIT, Rotation
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.errors import InvalidInput

Bytes = npt.NDArray[np.int8]

LEVELS = 127
LARGEST = 2.0**60
"""Norm beyond which a row is not coded, so that float32 holds all products; its `error` is infinite."""
SMALLEST = 2.0**-100
"""What is less is stored as 0, so that only a `square` may be subnormal, which some processors would read as 0."""
SCALE, REST, SQUARE, ERROR = range(4)
"""Columns of `terms`."""
ROOM = 1 + 2.0**-36
"""Factor for the roundings of an error itself, which is made of sums in float64 of at most 2^16 terms."""


@dataclass(frozen=True, eq=False)
class Projection:
    """f of rows [n], in float64, and how wrong it is at most."""

    coordinates: Doubles
    """[n, r]"""
    rest: Doubles
    """[n], the norm of what the coordinates leave."""
    error: Doubles
    """[n], at least the norm of the difference from the true f; infinite for rows that are too large, all else 0."""

    def __len__(self) -> int:
        return len(self.rest)

    def take(self, rows: slice | Ints) -> Projection:
        return Projection(self.coordinates[rows], self.rest[rows], self.error[rows])

    def prefix(self, r: int) -> Projection:
        """The same for the first `r` coordinates: the others join the rest."""
        if r == self.coordinates.shape[1]:
            return self
        rest = np.hypot(np.linalg.norm(self.coordinates[:, r:], axis=1), self.rest)
        return Projection(self.coordinates[:, :r], rest, self.error + rest * (ROOM - 1))


@dataclass(frozen=True, eq=False)
class ShortCodes:
    """Codes of rows [N]. They may be memory-mapped."""

    codes: Bytes
    """int8 [N, r]: coordinates / scale."""
    terms: Singles
    """float32 [N, 4]: `scale`, `rest`, `square` = |scale codes|^2 + rest^2 to the nearest, and `error` >= the norm of f
    minus what is stored of it; infinite for rows that are not coded, whose other terms are 0."""

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def r(self) -> int:
        return self.codes.shape[1]

    def take(self, rows: Ints) -> ShortCodes:
        return ShortCodes(self.codes[rows], self.terms[rows])


def project(rotation: Rotation, rows: Floats, metric: str) -> Projection:
    """Map rows [n, D] by f.

    Errors, in parts of |z|: rounding z (f does not lengthen it), u; the product, gamma_D |basis|_F (Higham 3.5); the
    basis not being U, `deviation`. Together k. From |z|^2 and the squared coordinates the rest's square is wrong by at
    most (2k (1 + k) + 5 gamma) |z|^2, and so the rest by the root of that; of all dimensions (r = D) no rest is left.

    Raises InvalidInput for rows of another dimension; for NaN or Inf, or rows all zero if the metric is cosine, with
    the `index` of the first.
    """
    if rows.ndim != 2 or rows.shape[1] != rotation.dim:
        raise InvalidInput(f"embeddings are {list(rows.shape)}", expected=f"[N, {rotation.dim}]")
    good = np.isfinite(rows).all(1)
    if not good.all():
        raise InvalidInput("embeddings hold NaN or Inf", index=int(good.argmin()))
    if metric == "cosine" and not (good := rows.any(1)).all():
        raise InvalidInput("embeddings are all zero and have no direction to compare", index=int(good.argmin()))
    z = comparable_rows(rows, metric)
    z -= rotation.mean
    with np.errstate(over="ignore", invalid="ignore"):  # of rows that are too large
        coordinates = z @ rotation.basis
        squares = np.einsum("nd,nd->n", z, z)
    gamma = 1.01 * (rotation.dim + 4) * UNIT
    # |basis|_F is at most that of U and the deviation
    relative = UNIT + gamma * (rotation.r**0.5 + rotation.deviation) * ROOM + rotation.deviation
    rest = np.zeros(len(z))
    if rotation.r < rotation.dim:
        rest = np.sqrt(np.maximum(squares - np.einsum("nr,nr->n", coordinates, coordinates), 0))
        relative += float(np.sqrt(2 * relative * (1 + relative) + 5 * gamma))
    error = np.sqrt(squares) * relative * ROOM + SMALLEST
    large = ~(squares < LARGEST**2)
    if large.any():
        coordinates[large], rest[large], error[large] = 0, 0, np.inf
    return Projection(coordinates, rest, error)


class Rounded(NamedTuple):
    """A projection [n] in whole numbers, one scale per row."""

    codes: Doubles
    """[n, r]"""
    scale: Singles
    rest: Singles
    square: Doubles
    """|scale codes|^2 + rest^2"""
    error: Doubles
    """At least the norm of f minus what is stored of it."""

    @classmethod
    def of(cls, projection: Projection, levels: int) -> Rounded:
        """`levels`: the largest code."""
        scale = (np.abs(projection.coordinates).max(1) / levels).astype(np.float32)
        scale[scale < SMALLEST] = 0
        rest = projection.rest.astype(np.float32)
        rest[rest < SMALLEST] = 0
        divisor = np.where(scale > 0, scale, np.float32(np.inf)).astype(np.float64)[:, None]
        codes = np.rint(projection.coordinates / divisor)
        np.clip(codes, -levels, levels, out=codes)  # a scale that was rounded down
        decoded = codes * scale[:, None].astype(np.float64)
        square = np.einsum("nr,nr->n", decoded, decoded) + np.square(rest.astype(np.float64))
        return cls(codes, scale, rest, square, distance_to(projection, decoded, rest) + projection.error)


def quantize(projection: Projection) -> ShortCodes:
    """The codes of a projection."""
    some = Rounded.of(projection, LEVELS)
    terms = np.stack([some.scale, some.rest, some.square.astype(np.float32), rounded_up(some.error)], axis=1)
    return ShortCodes(some.codes.astype(np.int8), terms)


def distance_to(projection: Projection, coordinates: Floats, rest: Floats) -> Doubles:
    """At least the norm of the difference [n] between a projection and what is stored of it, in float64 or float32."""
    gaps = projection.coordinates - coordinates
    return np.sqrt(np.einsum("nr,nr->n", gaps, gaps) + np.square(projection.rest - rest)) * ROOM


def rounded_up(values: Doubles) -> Singles:
    """The least float32 that is not below, or the one after it."""
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))


def encode(rotation: Rotation, rows: Floats, metric: str) -> ShortCodes:
    """The short codes of embeddings [N, D], chunk by chunk, so that memory beyond the codes stays bounded.

    Raises InvalidInput as `project`, its `index` that of the row.
    """
    codes = ShortCodes(np.empty((len(rows), rotation.r), np.int8), np.empty((len(rows), 4), np.float32))
    for place in chunks(len(rows)):
        try:
            some = quantize(project(rotation, rows[place], metric))
        except InvalidInput as error:
            error.index = None if error.index is None else error.index + place.start
            raise
        codes.codes[place], codes.terms[place] = some.codes, some.terms
    return codes


def chunks(count: int, size: int = MAX_ROWS) -> Iterator[slice]:
    """Slices of so many rows, one after another."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
