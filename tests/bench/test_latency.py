import numpy as np
import pytest

from pmm.bench.latency import Latency, LatencyPlan, measure, median_ratio


class Clock:
    """A clock that only steps move: what is measured is then exact."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def step(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds

        return run


PLAN = LatencyPlan(warmup=10 / 128, samples=40, block=5, settle=0.0, budget=1e9)


def test_known_durations_are_measured_right():
    clock = Clock()
    steps = {"a": clock.step("a", 0.010), "b": clock.step("b", 0.025)}
    latencies = measure(steps, PLAN, clock=clock)
    assert latencies["a"].p50 == pytest.approx(10)
    assert latencies["b"].p50 == pytest.approx(25)
    assert latencies["a"].per_second(8) == pytest.approx(800)
    assert len(latencies["a"].samples_ms) == 40


def test_steps_take_turns_in_blocks_after_warm_up():
    clock = Clock()
    measure({"a": clock.step("a", 1 / 128), "b": clock.step("b", 2 / 128)}, PLAN, clock=clock)
    warm = {"a": 10, "b": 5}
    assert clock.log[: sum(warm.values())] == ["a"] * warm["a"] + ["b"] * warm["b"]
    turns = "".join(clock.log[sum(warm.values()) :])
    blocks = [turns[i : i + 6] for i in range(0, len(turns), 6)]  # one uncounted run, then five samples
    assert all(len(set(block)) == 1 for block in blocks)
    assert all({blocks[i][0], blocks[i + 1][0]} == {"a", "b"} for i in range(0, len(blocks), 2))
    assert len({block[0] for block in blocks[::2]}) == 2  # the order within a round is random


def test_a_slow_step_ends_with_its_budget_but_not_without_a_block():
    clock = Clock()
    plan = LatencyPlan(warmup=0.0, samples=40, block=5, settle=0.0, budget=3.0)
    latencies = measure({"slow": clock.step("slow", 10.0), "fast": clock.step("fast", 0.001)}, plan, clock=clock)
    assert len(latencies["slow"].samples_ms) == 5
    assert len(latencies["fast"].samples_ms) == 40
    assert latencies["slow"].p90 is None


def test_the_start_of_a_turn_is_not_counted():
    """A step that is slow after another one's turn is measured as it runs by itself."""
    clock = Clock()
    since = {"a": 0}

    def disturbed():
        since["a"] += 1
        clock.now += 8 / 128 if since["a"] <= 2 else 1 / 128

    def other():
        since["a"] = 0
        clock.now += 1 / 128

    plan = LatencyPlan(warmup=0.0, samples=40, block=5, settle=16 / 128, budget=1e9)
    assert set(measure({"a": disturbed, "b": other}, plan, clock=clock)["a"].samples_ms) == {1000 / 128}


def test_percentiles():
    samples = tuple(float(v) for v in np.random.default_rng(0).permutation(np.arange(1, 101)))
    assert Latency(samples_ms=samples).p90 == 90.0
    assert Latency(samples_ms=samples).p50 == 50.5
    assert Latency(samples_ms=samples[:35]).p90 is None
    assert Latency(samples_ms=samples[:36]).p90 is not None


def test_a_stopwatch_replaces_the_clock_and_turns_need_no_lead():
    clock = Clock()
    plan = LatencyPlan(warmup=0.0, warmup_runs=1, lead=0, samples=4, block=2, settle=0.0, budget=1e9)
    watched = []

    def stopwatch(step):
        step()
        watched.append(step)
        return 42.0

    latencies = measure({"a": clock.step("a", 1.0)}, plan, clock=clock, stopwatch=stopwatch)
    assert latencies["a"].samples_ms == (42.0,) * 4
    assert len(watched) == 4
    assert clock.log == ["a"] * 5


def test_a_ratio_is_paired_over_rounds():
    """A machine that slows down slows both: the interval of their ratio stays narrow."""
    drift = np.repeat(np.linspace(1, 10, 20), 2)
    slow, fast = (Latency(samples_ms=tuple(factor * drift)) for factor in (30.0, 10.0))
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


def test_too_few_rounds_give_a_ratio_without_an_interval():
    above, below = Latency(samples_ms=(4.0,) * 10), Latency(samples_ms=(2.0,) * 30)
    ratio = median_ratio(above, below, block=2)
    assert (ratio.value, ratio.interval) == (2, None)
    assert ratio.times(0.5).interval is None
