import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from pmm.bench.statistics import Latency, median_ratio, percentile, percentile_interval, stability_flags

SMALLEST = {10: 36, 50: 6, 90: 36, 95: 72, 99: 368}


def shuffled(n):
    """1..n: each sample is its own rank."""
    return tuple(float(v) for v in np.random.default_rng(n).permutation(np.arange(1, n + 1)))


def at(n, apart=0.5):
    """When n turns began."""
    return apart * np.arange(n)


def flags(turns, **options):
    """Of an array [turns, block]."""
    turns = np.asarray(turns, float)
    return stability_flags(turns.ravel(), at(len(turns)), block=turns.shape[1], **options)


def test_a_percentile_is_a_sample():
    assert [percentile(shuffled(100), percent) for percent in (50, 90, 95, 99)] == [51, 91, 96, 100]
    assert [percentile(shuffled(99), percent) for percent in (50, 90, 95, 99)] == [50, 90, 95, 99]
    assert [percentile((7.0,), percent) for percent in (50, 99)] == [7, 7]


@pytest.mark.parametrize("percent", [25, 50, 75, 90, 95, 97, 99])
def test_a_percentile_is_the_least_sample_that_more_than_the_percentage_do_not_exceed(percent):
    for n in (*range(1, 130), 200, 368, 1000, 12_800):
        rank = int(percentile(np.arange(1, n + 1), percent))
        assert Fraction(rank - 1, n) <= Fraction(percent, 100) < Fraction(rank, n)


@pytest.mark.parametrize(("percent", "smallest"), SMALLEST.items())
def test_a_percentile_has_an_interval_from_the_smallest_number_of_samples_that_allows_one(percent, smallest):
    assert percentile_interval(shuffled(smallest), percent) is not None
    assert all(percentile_interval(shuffled(n), percent) is None for n in range(1, smallest))
    share = Fraction(max(percent, 100 - percent), 100)
    assert share**smallest <= Fraction(25, 1000) < share ** (smallest - 1)  # that all samples lie on one side of it


@pytest.mark.parametrize(("percent", "smallest"), SMALLEST.items())
def test_an_interval_is_the_narrowest_whose_sides_err_in_a_fortieth_of_all_cases(percent, smallest):
    """By the exact binomial distribution of how many samples lie below the percentile."""
    share, most = Fraction(percent, 100), Fraction(25, 1000)
    for n in (smallest, smallest + 1, 2 * smallest + 3, 400, 1100):
        below = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        low, high = map(int, percentile_interval(shuffled(n), percent))
        assert sum(below[:low]) <= most < sum(below[: low + 1])
        assert sum(below[high:]) <= most < sum(below[high - 1 :])
        assert low <= percentile(shuffled(n), percent) <= high


def test_a_ratio_is_paired_over_rounds():
    """A machine that slows down slows both: the interval of their ratio stays narrow."""
    drift = np.repeat(np.linspace(1, 10, 20), 2)
    slow, fast = (Latency(samples_ms=tuple(factor * drift)) for factor in (30.0, 10.0))
    assert slow.p50 == percentile(slow.samples_ms, 50)
    ratio = median_ratio(slow, fast, block=2)
    assert (ratio.value, *ratio.interval) == pytest.approx((3, 3, 3))
    half = ratio.times(0.5)
    assert (half.value, *half.interval) == pytest.approx((1.5, 1.5, 1.5))


@pytest.mark.parametrize("fewer", [60, 20])
def test_a_ratio_of_noise_has_an_interval_that_covers_it(fewer):
    """Also where one step ended with its budget and has fewer rounds."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        above = Latency(samples_ms=tuple(20 + rng.normal(size=fewer)))
        below = Latency(samples_ms=tuple(10 + rng.normal(size=60)))
        low, high = median_ratio(above, below, block=2, seed=seed, resamples=400).interval
        covered += low <= 2 <= high
    assert 175 < covered < 200


def test_rounds_are_drawn_whole():
    """Rounds that differ, of equal samples: ten times as many samples make a ratio no surer."""
    level = np.random.default_rng(0).lognormal(sigma=0.2, size=12)
    other = Latency(samples_ms=(1.0,) * 12)
    one = median_ratio(Latency(samples_ms=tuple(level)), other, block=1)
    other = Latency(samples_ms=(1.0,) * 120)
    ten = median_ratio(Latency(samples_ms=tuple(np.repeat(level, 10))), other, block=10)
    assert ten == one
    assert one.interval[0] < one.value < one.interval[1]
    assert {one.value, *one.interval} <= set(level)  # medians, the resampled ones too, are samples


def test_rounds_that_one_step_had_alone_do_not_count():
    """The machine may have been another by then."""
    longer = Latency(samples_ms=(2.0,) * 6 + (30.0,) * 60)
    ratio = median_ratio(longer, Latency(samples_ms=(1.0,) * 6), block=1)
    assert (ratio.value, ratio.interval) == (2, (2, 2))


def test_too_few_rounds_give_a_ratio_without_an_interval():
    above, below = Latency(samples_ms=(4.0,) * 10), Latency(samples_ms=(2.0,) * 30)
    ratio = median_ratio(above, below, block=2)
    assert (ratio.value, ratio.interval) == (2, None)
    assert ratio.times(0.5).interval is None
    assert median_ratio(above, below, block=1).interval == (2, 2)
    assert median_ratio(Latency(samples_ms=(4.0,) * 6), below, block=1).interval == (2, 2)


def test_steady_samples_have_no_flags():
    assert flags(np.full((20, 10), 9.0)) == ()
    assert flags(np.full((1, 1), 9.0)) == ()


def test_a_trend_is_flagged_with_its_size():
    rise = np.linspace(10, 11.2, 20)[:, None].repeat(5, 1)
    assert flags(rise) == ("drifts: 12 % slower at the end than at the start",)
    assert flags(rise[::-1]) == ("drifts: 11 % faster at the end than at the start",)


@pytest.mark.parametrize(("percent", "flagged"), [(4, False), (6, True), (-4, False), (-6, True)])
def test_a_small_trend_is_not_flagged_however_clear(percent, flagged):
    turns = np.geomspace(10, 10 * (1 + percent / 100), 50)[:, None].repeat(5, 1)
    assert bool(flags(turns)) == flagged


def test_a_trend_needs_seven_turns():
    rise = np.geomspace(10, 10.9, 7)[:, None].repeat(5, 1)
    assert flags(rise) == ("drifts: 9 % slower at the end than at the start",)
    assert flags(rise[:6]) == ()


def test_a_trend_is_over_time_and_not_over_turns():
    """Half of the turns crowd at the end, where another step had ended: 1 % per second all the same."""
    began = 7 + np.array([*range(10), *np.linspace(10, 11, 10)])
    turns = 10 * np.exp(0.01 * began)[:, None].repeat(5, 1)
    found = stability_flags(turns.ravel(), began, block=5)
    assert found == ("drifts: 12 % slower at the end than at the start",)


def test_a_bad_turn_is_no_trend():
    turns = np.random.default_rng(0).lognormal(math.log(10), 0.01, (20, 10))
    turns[-1] *= 3
    assert flags(turns) == ()


def test_a_bad_turn_does_not_size_a_trend():
    rise = np.linspace(10, 11.2, 20)[:, None].repeat(5, 1)
    rise[2] *= 10
    assert flags(rise) == ("drifts: 12 % slower at the end than at the start",)


def test_many_turns_do_not_take_much_memory():
    began = np.expm1(np.linspace(0, 3, 6000))
    rise = 10 * np.exp(0.09 * began / began[-1])
    tracemalloc.start()
    found = stability_flags(rise, began, block=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ("drifts: 9 % slower at the end than at the start",)
    assert peak < 100e6


def test_turns_that_differ_are_noise():
    turns = np.full((20, 10), 10.0)
    turns[3] = turns[8] = 14.2
    assert flags(turns) == ()
    turns[11] = 8.4
    said = "noisy: the medians of 3 of 20 turns are more than 15 % off; they range from 8.4 to 14.2 ms"
    assert flags(turns) == (said,)
    turns[11] = 8.6
    assert flags(turns) == ()


def test_one_bad_turn_of_a_few_is_not_enough():
    assert flags([[10.0]] * 4 + [[20.0]]) == ()
    assert flags([[10.0]] * 7 + [[20.0]] * 2)[0].startswith("noisy: the medians of 2 of 9 turns")


def test_two_speeds_within_turns_are_noise():
    turns = np.tile([10.0, 10.0, 10.0, 15.0, 15.0], (20, 2))
    assert flags(turns) == ("noisy: the middle half of the samples ranges from 10 to 15 ms",)
    assert flags(np.where(turns > 10, 11.9, 10.0)) == ()
    assert flags(np.where(turns > 10, 12.1, 10.0)) != ()
    assert flags(np.tile([10.0] * 8 + [15.0] * 3, (20, 1))) != ()
    assert flags(np.tile([10.0] * 3 + [15.0] * 8, (20, 1))) != ()


def test_a_few_slow_samples_of_each_turn_are_not_noise():
    """The median does not depend on them; the higher percentiles tell of them."""
    turns = np.full((20, 10), 10.0)
    turns[::4, :2] = 30
    assert flags(turns) == ()
    turns[:, :2] = 30
    assert flags(turns) == ()


def test_no_steady_state_is_flagged_before_all_else():
    rise = np.linspace(10, 20, 20)[:, None].repeat(5, 1)
    first, second, third = flags(rise, steady=False, warmup_s=5.04)
    assert first == "not steady: still changing after 5.0 s of warm-up"
    assert second.startswith("drifts: ")
    assert third.startswith("noisy: ")


def test_what_the_clock_cannot_tell_from_nothing_is_flagged():
    assert flags([[0.0] * 10] * 20) == ("too short: the clock measures some samples as 0 ms",)


def noise(rng, turns, *, between=0.0, correlation=0.0, within=0.03, block=10):
    """Log-normal samples [turns, block] around 10 ms; `between`: of the turns' levels, an autoregression."""
    level = rng.normal(size=turns)
    for index in range(1, turns):
        level[index] = correlation * level[index - 1] + math.sqrt(1 - correlation**2) * level[index]
    return 10 * np.exp(within * rng.normal(size=(turns, block)) + between * level[:, None])


PLAIN = {"within": 0.03}
CORRELATED = {"within": 0.021, "between": 0.021, "correlation": 0.3}  # 3 % together


@pytest.mark.parametrize("turns", [12, 20, 60])
@pytest.mark.parametrize("kind", [PLAIN, CORRELATED, {"within": 0.03, "block": 1}])
def test_steady_noise_is_seldom_flagged(turns, kind):
    rng = np.random.default_rng(turns)
    assert sum(bool(flags(noise(rng, turns, **kind))) for _ in range(1000)) < 20


@pytest.mark.parametrize(("turns", "kind"), [(12, PLAIN), (20, PLAIN), (60, PLAIN), (20, CORRELATED), (60, CORRELATED)])
def test_a_drift_of_a_tenth_is_mostly_flagged(turns, kind):
    rng = np.random.default_rng(turns)
    drift = np.linspace(1, 1.1, turns)[:, None]
    found = [flags(noise(rng, turns, **kind) * drift) for _ in range(300)]
    assert sum(any(line.startswith("drifts: ") for line in lines) for lines in found) > 270


@pytest.mark.parametrize("turns", [12, 20, 60])
@pytest.mark.parametrize("kind", [PLAIN, CORRELATED])
def test_a_machine_that_is_slower_in_a_third_of_the_turns_is_mostly_flagged(turns, kind):
    rng = np.random.default_rng(turns)
    found = [flags(noise(rng, turns, **kind) * np.where(rng.random((turns, 1)) < 0.3, 1.5, 1)) for _ in range(500)]
    assert sum(any(line.startswith("noisy: ") for line in lines) for lines in found) > 450


@pytest.mark.parametrize(("period", "seen"), [(2000.0, True), (100.0, True), (30.0, True), (1.0, False)])
def test_a_second_process_that_wants_the_core_half_of_the_time_is_flagged(period, seen):
    """It then gets half of it. Samples of 10 ms of work; what comes and goes faster than that slows all down alike."""
    rng, now, samples = np.random.default_rng(0), 0.0, []
    for _ in range(200):
        left, begin = 10 * math.exp(0.03 * rng.normal()), now
        while left > 1e-9:
            rate = 1.0 if now % period < period / 2 else 0.5
            step = min(left / rate, period / 2 - now % (period / 2))
            left, now = left - step * rate, now + step
        samples.append(now - begin)
    assert any(line.startswith("noisy: ") for line in stability_flags(samples, at(20), block=10)) == seen
