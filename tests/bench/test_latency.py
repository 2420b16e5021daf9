import numpy as np
import pytest

from pmm.bench.latency import Latency, LatencyPlan, measure


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
