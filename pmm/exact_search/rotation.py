"""The directions in which a gallery's embeddings differ most: what short codes keep of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pmm.evaluation.embedding_matrix import comparable_rows
from pmm.utils.arrays import Doubles, Floats
from pmm.utils.errors import InvalidInput

UNIT = 2.0**-53
"""Unit roundoff of float64."""
OUTLYING = 100
"""So many times as far from the middle as half of a sample, a row is left out of the fit, which it would decide."""
MAX_DEVIATION = 0.1
"""Of a basis from orthonormal columns. Errors that are derived for it would hold for a little more."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """Coordinates of an embedding: basis^T (row - mean).

    Any mean and any basis give exact search; good ones make it fast. Raises InvalidInput for what is no such pair.
    """

    mean: Doubles
    """[D]"""
    basis: Doubles
    """[D, r], 1 <= r <= D, its columns nearly orthonormal."""

    def __post_init__(self) -> None:
        shapes = self.mean.shape, self.basis.shape
        if self.basis.ndim != 2 or shapes[0] != shapes[1][:1] or not 1 <= self.r <= self.dim:
            problem = f"a rotation's mean is {list(shapes[0])}, its basis {list(shapes[1])}"
            raise InvalidInput(problem, expected="[D] and [D, r]")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.basis).all()):
            raise InvalidInput("a rotation holds NaN or Inf")
        if not self.deviation <= MAX_DEVIATION:  # nor is NaN
            raise InvalidInput(f"a rotation's basis deviates by {self.deviation:.2g}", expected="orthonormal columns")

    @property
    def dim(self) -> int:
        return len(self.basis)

    @property
    def r(self) -> int:
        return self.basis.shape[1]

    @cached_property
    def deviation(self) -> float:
        """Not less than the norm of basis - U, where U is the nearest matrix with orthonormal columns.

        For each singular value s of the basis, |s - 1| <= |s^2 - 1|, so it is at most the Frobenius norm of
        basis^T basis - 1, to which the rounding of that product is added (Higham 3.5).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            gram = self.basis.T @ self.basis
            rounding = 2 * (self.dim + 2) * UNIT * float(np.square(self.basis).sum() + 1)
            return float(np.linalg.norm(gram - np.eye(self.r))) * (1 + 1e-6) + rounding

    @classmethod
    def fit(cls, sample: Floats, r: int, metric: str = "euclidean") -> Rotation:
        """The principal axes of a sample of embeddings [n, D], n >= 1, about their mean; the first varies most."""
        rows = _without_outliers(comparable_rows(sample, metric))
        mean = rows.mean(0)
        rows -= mean
        largest = np.abs(rows).max() or 1.0
        rows /= largest  # squares stay in range
        _, basis = np.linalg.eigh(rows.T @ rows)  # ascending
        return cls(mean, np.ascontiguousarray(basis[:, ::-1][:, :r]))


def _without_outliers(rows: Doubles) -> Doubles:
    middle = np.median(rows[:: -(-len(rows) // 1024)], axis=0)
    parts = np.array_split(rows, -(-len(rows) // 4096))
    distances = np.concatenate([np.linalg.norm(part - middle, axis=1) for part in parts])
    near = ~(distances > (OUTLYING * np.median(distances) or np.inf))
    return rows if near.all() else rows[near]
