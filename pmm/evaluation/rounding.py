"""Products and squares in float32 with little rounding, and bounds on it that hold for any order of summation.

A sum of n products in floating point is off by at most gamma_n = n u / (1 - n u) times the sum of the products' sizes,
u the unit roundoff (Higham, Accuracy and Stability of Numerical Algorithms, 3.1; 4.2 for sums of sums). So short sums
that are then added up are much closer than one long sum: sqrt(n) for n. Loads no torch.
"""

from __future__ import annotations

import numpy as np

from pmm.utils.arrays import Doubles, Singles

DIMS_AT_ONCE = 128
"""In one part of a product: half as many would halve the error, and make BLAS a tenth slower."""
SQUARES_AT_ONCE = 8
"""In one sum of float32."""
UNIT = float(np.finfo(np.float32).eps) / 2
UNIT64 = float(np.finfo(np.float64).eps) / 2
SLACK = 1.01 * (1 + 1e-3) ** 2
"""For 1 / (1 - n u), and for norms that are rounded."""
UNDERFLOW = 2.0**-125
"""A number this small may vanish, also where tiny numbers count as 0."""


def product_error(norms: Doubles, longest: float | Doubles, dim: int) -> Doubles:
    """Of |q|^2 / 2 + |g|^2 / 2 - q.g by a product in float32 of squares that were summed in float64, for queries of
    these `norms` and a gallery of norms up to `longest`: the product's gamma_D |q| |g|, and the rounding of what goes
    into it and comes out of it."""
    return ((dim + 8) * UNIT * longest * norms + 8 * UNIT * (norms + longest) ** 2) * SLACK


def float64_error(norms: Doubles, longest: float, dim: int) -> Doubles:
    """As `product_error`, all of it in float64: by how much it differs from half the square of q - g in float64, a sum
    of D rounded terms too."""
    return (dim + 8) * UNIT64 * (norms + longest) ** 2 * SLACK


def product_in_parts(queries: Singles, items: Singles, spare: Singles) -> Singles:
    """`queries @ items.T` [q, g], by `DIMS_AT_ONCE` dimensions at once, in the first of `spare` [2, at least q g]."""
    shape = len(queries), len(items)
    total, part = (numbers[: shape[0] * shape[1]].reshape(shape) for numbers in spare)
    out = total
    for start in range(0, max(1, queries.shape[1]), DIMS_AT_ONCE):
        dims = slice(start, start + DIMS_AT_ONCE)
        np.matmul(queries[:, dims], items[:, dims].T, out=out)
        if out is part:
            total += part
        out = part
    return total


def half_squares_float32(rows: Singles) -> Doubles:
    """Half the squared norm of each row [N, D]: a function of the row alone, from sums of `SQUARES_AT_ONCE` squares in
    float32 that are added up in float64."""
    whole = rows.shape[1] // SQUARES_AT_ONCE * SQUARES_AT_ONCE
    parts, rest = rows[:, :whole].reshape(len(rows), SQUARES_AT_ONCE, -1), rows[:, whole:]
    squares = np.einsum("npd,npd->nd", parts, parts).sum(1, dtype=np.float64)
    return (squares + np.einsum("nd,nd->n", rest, rest)) / 2


def refined_error(norms: Doubles, longest: float, dim: int, dims_at_once: int) -> Doubles:
    """As `product_error`, of products in parts of so many dimensions, and `half_squares_float32` of rows that were
    rounded to float32 once."""
    terms = min(dim, dims_at_once) + -(-dim // dims_at_once) + 8
    halves = (norms**2 + longest**2) / 2
    return SLACK * UNIT * (terms * norms * longest + (SQUARES_AT_ONCE + 8) * halves) + dim * UNDERFLOW


def pair_error(values: Doubles, dim: int) -> Doubles:
    """Of half the squared norms [P] of differences of two float32 rows, by `half_squares_float32`: each difference is
    rounded, and counts twice in its square."""
    return SLACK * UNIT * (SQUARES_AT_ONCE + 3) * values + dim * UNDERFLOW


def pair_error_float64(values: Doubles, dim: int) -> Doubles:
    """As `pair_error`, of sums in float64 in another order than those of `exact_pairs`, which round too."""
    return SLACK * UNIT64 * 2 * (dim + 8) * values
