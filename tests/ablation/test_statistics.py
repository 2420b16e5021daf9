"""Intervals of paired differences: exact quantiles, the promised coverage, and honest words where there is none."""

import math
from statistics import NormalDist, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.ablation.statistics import (
    NO_COMMON_SEED,
    NO_SPREAD,
    NOT_SIGNIFICANT,
    ONE_SEED,
    difference,
    mean_interval,
    spread,
)

FIGURES = st.floats(0, 1)
RUNS = st.dictionaries(st.integers(0, 9), FIGURES, min_size=1, max_size=10)


def quantile(freedom):
    """Of Student's t at 97.5 %, out of an interval: its half over the mean's standard error."""
    values = [1.0, *[0.0] * freedom]
    low, high = mean_interval(values)
    return (high - low) / 2 / (stdev(values) / math.sqrt(len(values)))


@pytest.mark.parametrize(
    ("freedom", "value"),
    [  # printed tables of Student's t
        (1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451), (5, 2.5705818), (9, 2.2621572),
        (10, 2.2281389), (30, 2.0422725), (100, 1.9839715),
    ],
)  # fmt: skip
def test_intervals_have_the_quantiles_of_the_tables(freedom, value):
    assert quantile(freedom) == pytest.approx(value, abs=5e-8)


def test_quantiles_tend_to_the_normal_distributions():
    assert quantile(100_000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8])
def test_quantiles_are_those_of_students_density(freedom):
    """The density, integrated by Simpson's rule up to the quantile, gives the probability back."""
    end = quantile(freedom)
    x = np.linspace(0, end, 20_001)
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    y = constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    area = (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * (x[1] - x[0]) / 3
    assert area == pytest.approx(0.475, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_covers_the_truth_in_95_of_100_cases(n):
    rng, truth, cases = np.random.default_rng(n), 0.013, 4000
    found = [mean_interval(row.tolist()) for row in rng.normal(truth, 0.02, (cases, n))]
    covered = np.mean([low <= truth <= high for low, high in found])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / cases))


def test_pairing_removes_what_the_seeds_share():
    """The rows differ by 0.01 at every seed; the seeds differ by much more, and in another order in one of the rows."""
    rng = np.random.default_rng(0)
    base = {seed: 0.5 + 0.1 * rng.random() for seed in range(5)}
    better = {seed: base[seed] + 0.01 + 0.001 * rng.random() for seed in (3, 1, 4, 0, 2)}
    found = difference(better, base)
    assert found.seeds == (0, 1, 2, 3, 4)
    assert found.reading == "higher"
    assert 0.01 < found.interval[0] < found.mean < found.interval[1] < 0.0115
    assert difference(base, better).reading == "lower"


def test_only_seeds_that_both_finished_are_compared():
    found = difference({0: 0.5, 2: 0.75, 7: 0.9}, {0: 0.25, 1: 0.1, 2: 0.25})
    assert (found.seeds, found.per_seed, found.mean) == ((0, 2), (0.25, 0.5), 0.375)
    low, high = found.interval
    assert (low, high) == pytest.approx((0.375 - 12.7062047 * 0.125, 0.375 + 12.7062047 * 0.125))
    assert found.reading == NOT_SIGNIFICANT


def test_what_has_no_interval_says_why():
    one = difference({3: 0.5}, {3: 0.25})
    assert (one.mean, one.interval, one.reading) == (0.25, None, ONE_SEED)
    none = difference({3: 0.5}, {4: 0.25})
    assert (none.mean, none.interval, none.reading) == (None, None, NO_COMMON_SEED)
    stuck = difference({0: 0.4, 1: 0.2, 2: 0.7}, {0: 0.3, 1: 0.1, 2: 0.6})  # 0.1 each, but for the last bits
    assert stuck.mean == pytest.approx(0.1)
    assert (stuck.interval, stuck.reading) == (None, NO_SPREAD)
    same = difference({0: 0.4, 1: 0.2}, {0: 0.4, 1: 0.2})
    assert (same.mean, same.interval, same.reading) == (0, None, NOT_SIGNIFICANT)
    assert difference({}, {}).reading == NO_COMMON_SEED


@given(RUNS, RUNS)
def test_a_difference_is_what_it_says(row, against):
    found, back = difference(row, against), difference(against, row)
    assert set(found.seeds) == set(row) & set(against)
    assert back.per_seed == tuple(-value for value in found.per_seed)
    if found.interval is None:
        assert found.reading in {ONE_SEED, NO_SPREAD, NO_COMMON_SEED, NOT_SIGNIFICANT}
        assert len(found.seeds) < 2 or max(found.per_seed) == pytest.approx(min(found.per_seed), abs=1e-11)
        return
    low, high = found.interval
    assert low < found.mean < high
    assert back.interval == pytest.approx((-high, -low))
    expected = "higher" if low > 0 else "lower" if high < 0 else NOT_SIGNIFICANT
    assert found.reading == expected
    assert {found.reading, back.reading} in ({"higher", "lower"}, {NOT_SIGNIFICANT})


def test_the_boundary_is_not_told_apart():
    found = mean_interval([0.0, 1.0])
    assert found[0] < 0 < found[1]
    reach = (found[1] - found[0]) / 2
    assert difference({0: reach, 1: 1 + reach}, {0: 0.0, 1: 0.0}).reading == "higher"
    assert difference({0: reach - 0.6, 1: reach + 0.4}, {0: 0.0, 1: 0.0}).reading == NOT_SIGNIFICANT


@given(st.lists(FIGURES, min_size=1, max_size=12))
def test_spread(values):
    found = spread(values)
    assert (found.n, found.min, found.max) == (len(values), min(values), max(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd is None if len(values) == 1 else found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_no_value_has_no_spread():
    assert spread([]) is None
