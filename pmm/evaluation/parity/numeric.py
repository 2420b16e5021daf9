"""Are two sets of embeddings the same numbers? Judged row by row: an average hides the one wrong row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmm.evaluation.parity.labels import check_finite
from pmm.utils.arrays import Floats
from pmm.utils.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class NumericParity:
    """How far a candidate's embeddings [N, D] are from the reference's."""

    rows: int
    min_cosine: float
    """Cosine similarity of the worst row."""
    worst_row: int
    p1_cosine: float
    """1st percentile over rows."""
    median_cosine: float
    mean_cosine: float
    centred_min_cosine: float
    """Of the worst row, without the reference's mean row: what is left where all embeddings are almost alike."""
    max_norm_error: float
    """Largest relative difference of a row's norm, which a cosine does not see and a Euclidean ranking does."""
    max_abs: float
    """Largest absolute difference of any number."""


def numeric_parity(reference: Floats, candidate: Floats) -> NumericParity:
    """Compare embeddings [N, D] row by row, in float64. A row that is all zero on both sides counts as equal.

    Raises InvalidInput for different shapes, no rows, or NaN or Inf on either side.
    """
    reference, candidate = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if reference.shape != candidate.shape or reference.ndim != 2 or not len(reference):
        raise InvalidInput(
            f"reference embeddings are {list(reference.shape)}, candidate embeddings {list(candidate.shape)}",
            expected="equal [N, D], N >= 1",
        )
    for name, rows in (("reference", reference), ("candidate", candidate)):
        check_finite(rows, f"parity: {name} embeddings")
    cosine, mean = _cosine(reference, candidate), reference.mean(0)
    norms = np.linalg.norm(reference, axis=1)
    norm_error = np.abs(np.linalg.norm(candidate, axis=1) - norms) / np.where(norms > 0, norms, 1)
    return NumericParity(
        rows=len(cosine),
        min_cosine=float(cosine.min()),
        worst_row=int(cosine.argmin()),
        p1_cosine=float(np.percentile(cosine, 1, method="inverted_cdf")),
        median_cosine=float(np.median(cosine)),
        mean_cosine=float(cosine.mean()),
        centred_min_cosine=float(_cosine(reference - mean, candidate - mean).min()),
        max_norm_error=float(norm_error.max()),
        max_abs=float(np.abs(reference - candidate).max()),
    )


def _cosine(reference: Floats, candidate: Floats) -> npt.NDArray[np.float64]:
    """Row by row; equal rows have 1, also if they are zero."""
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(candidate, axis=1)
    equal = (reference == candidate).all(1)
    return np.where(equal, 1.0, (reference * candidate).sum(1) / np.where(norms > 0, norms, 1))
