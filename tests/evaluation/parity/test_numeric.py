import numpy as np
import pytest

from pmm.evaluation.parity.numeric import numeric_parity
from pmm.utils.errors import InvalidInput
from tests.refusals import refuses


def rows(n=200, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_equal_is_equal():
    parity = numeric_parity(rows(), rows())
    assert (parity.min_cosine, parity.median_cosine, parity.max_abs, parity.rows) == (1.0, 1.0, 0.0, 200)


def test_one_wrong_row_is_found():
    candidate = rows()
    candidate[137] = rows(1, seed=5)[0]
    parity = numeric_parity(rows(), candidate)
    assert parity.worst_row == 137
    assert parity.min_cosine < 0.9
    assert parity.median_cosine == 1.0


def test_cosine_by_hand():
    parity = numeric_parity([[1.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [3.0, 4.0]])
    assert parity.min_cosine == pytest.approx(1 / np.sqrt(2))
    assert parity.max_abs == 1.0


def test_the_first_percentile_is_the_second_worst_of_101():
    candidate = rows(101)
    candidate[20], candidate[70] = -candidate[20], rows(1, seed=5)[0]
    parity = numeric_parity(rows(101), candidate)
    assert parity.worst_row == 20
    assert parity.min_cosine == pytest.approx(-1)
    assert parity.p1_cosine == pytest.approx(numeric_parity(rows(101)[70:71], candidate[70:71]).min_cosine)


def test_zero_rows():
    assert numeric_parity(np.zeros((1, 3)), np.zeros((1, 3))).min_cosine == 1.0
    assert numeric_parity(np.ones((1, 3)), np.zeros((1, 3))).min_cosine == 0.0


@pytest.mark.parametrize(
    ("reference", "candidate", "facts"),
    [
        (rows(), rows(199), ("[200, 16]", "[199, 16]")),
        (rows(), np.where(np.arange(200)[:, None] == 3, np.nan, rows()), ("candidate", "1 of 200", "NaN", "row 3")),
        (np.where(np.arange(200)[:, None] == 3, np.inf, rows()), rows(), ("reference", "1 of 200", "NaN", "row 3")),
        (rows(0), rows(0), ("[0, 16]", "N >= 1")),
    ],
)
def test_what_cannot_be_compared(reference, candidate, facts):
    with refuses(InvalidInput, *facts):
        numeric_parity(reference, candidate)
