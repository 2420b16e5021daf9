import dataclasses
import time
from itertools import chain, repeat

import pytest

from pmm.bench.latency import LatencyPlan, interleave, measure, run_turn, throughput, warm_up
from pmm.runtime.base import BoundRun


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

    def turn(self, name, seconds, block):
        """For `interleave`: takes `seconds`."""

        def run():
            self.step(name, seconds)()
            return [float(self.log.count(name))] * block

        return run


class Ticking(Clock):
    """A clock that each look moves by a second."""

    def __call__(self):
        self.now += 1
        return self.now


PLAN = LatencyPlan(warmup=10 / 128, samples=40, block=5, settle=0.0, budget=1e9)
AT_ONCE = LatencyPlan(warmup=0.0, samples=40, block=5, settle=0.0, budget=1e9)


def test_known_durations_are_measured_right():
    clock = Clock()
    steps = {"a": clock.step("a", 0.010), "b": clock.step("b", 0.025)}
    latencies = measure(steps, PLAN, clock=clock)
    assert latencies["a"].p50 == pytest.approx(10)
    assert latencies["b"].p50 == pytest.approx(25)
    assert len(latencies["a"].samples_ms) == 40


def test_steps_take_turns_in_blocks_after_warm_up():
    clock = Clock()
    latencies = measure({"a": clock.step("a", 1 / 128), "b": clock.step("b", 2 / 128)}, PLAN, clock=clock)
    warm = {"a": 10, "b": 5}
    assert clock.log[: sum(warm.values())] == ["a"] * warm["a"] + ["b"] * warm["b"]
    turns = "".join(clock.log[sum(warm.values()) :])
    blocks = [turns[i : i + 6] for i in range(0, len(turns), 6)]  # one uncounted run, then five samples
    assert all(len(set(block)) == 1 for block in blocks)
    assert all({blocks[i][0], blocks[i + 1][0]} == {"a", "b"} for i in range(0, len(blocks), 2))
    assert len({block[0] for block in blocks[::2]}) == 2  # the order within a round is random
    began, now = {"a": [], "b": []}, 0.0
    for block in blocks:
        began[block[0]].append(now)
        now += 6 * {"a": 1, "b": 2}[block[0]] / 128
    assert {name: list(found.turns_s) for name, found in latencies.items()} == began


def test_a_slow_step_ends_with_its_budget_but_not_without_a_block():
    clock = Clock()
    plan = dataclasses.replace(AT_ONCE, budget=3.0)
    latencies = measure({"slow": clock.step("slow", 10.0), "fast": clock.step("fast", 0.001)}, plan, clock=clock)
    assert len(latencies["slow"].samples_ms) == 5
    assert len(latencies["fast"].samples_ms) == 40


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

    plan = dataclasses.replace(AT_ONCE, settle=16 / 128)
    assert set(measure({"a": disturbed, "b": other}, plan, clock=clock)["a"].samples_ms) == {1000 / 128}


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


def test_a_turn_leads_in_then_samples():
    clock = Clock()
    assert run_turn(clock.step("a", 0.5), LatencyPlan(settle=2.0, lead=1, block=3), clock) == [500.0] * 3
    assert len(clock.log) == 4 + 3
    clock.log.clear()
    run_turn(clock.step("a", 0.5), LatencyPlan(settle=0.5, lead=6, block=3), clock)
    assert len(clock.log) == 6 + 3


def test_a_sample_holds_the_step_and_one_look_at_the_clock():
    clock = Ticking()
    plan = LatencyPlan(settle=0.0, lead=1, block=100)
    assert run_turn(lambda: None, plan, clock) == [1000.0] * 100
    assert clock.now == 2 + 2 * 100


def test_real_sleeps_are_never_measured_shorter():
    plan = LatencyPlan(warmup=0.0, samples=10, block=5, settle=0.0)
    latencies = measure({"sleep": lambda: time.sleep(0.01), "nothing": lambda: None}, plan)
    assert min(latencies["sleep"].samples_ms) >= 10
    assert min(latencies["nothing"].samples_ms) < 10
    first, second = latencies["sleep"].turns_s
    assert second - first >= 5 * 0.01


def test_the_order_of_turns_is_random_and_that_of_its_seed():
    def order(seed):
        clock = Clock()
        interleave({name: clock.turn(name, 1.0, 5) for name in "abcd"}, AT_ONCE, seed=seed, clock=clock)
        return "".join(clock.log)

    rounds = [order(0)[i : i + 4] for i in range(0, 32, 4)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 4
    assert order(0) == order(0)
    assert len({order(seed) for seed in range(5)}) == 5


def test_samples_are_kept_in_the_order_taken_with_when_each_turn_began():
    clock = Clock()
    clock.now = 100.0
    found = interleave({"a": clock.turn("a", 2.0, 5)}, AT_ONCE, clock=clock)
    assert found.latencies["a"].samples_ms == tuple(float(turn) for turn in range(1, 9) for _ in range(5))
    assert found.latencies["a"].turns_s == tuple(2.0 * turn for turn in range(8))
    assert found.failures == {}


def test_samples_are_taken_to_a_full_block():
    clock = Clock()
    plan = dataclasses.replace(AT_ONCE, samples=11)
    assert len(interleave({"a": clock.turn("a", 1.0, 5)}, plan, clock=clock).latencies["a"].samples_ms) == 15


def test_a_step_spends_its_own_budget_only():
    clock = Clock()
    turns = {"slow": clock.turn("slow", 2.0, 5), "fast": clock.turn("fast", 1.0, 5)}
    found = interleave(turns, dataclasses.replace(AT_ONCE, budget=6.0), clock=clock)
    assert clock.log.count("slow") == 3
    assert clock.log.count("fast") == 6
    assert {name: len(latency.samples_ms) for name, latency in found.latencies.items()} == {"slow": 15, "fast": 30}


def test_a_step_whose_turn_fails_is_dropped_and_the_others_go_on():
    clock = Clock()
    wrong = OSError("it is gone")

    def failing():
        clock.log.append("failing")
        if clock.log.count("failing") == 3:
            raise wrong
        return [1.0] * 5

    turns = {"a": clock.turn("a", 1.0, 5), "failing": failing, "b": clock.turn("b", 1.0, 5)}
    found = interleave(turns, AT_ONCE, clock=clock, drop=(OSError, EOFError))
    assert found.failures == {"failing": wrong}
    assert list(found.latencies) == ["a", "b"]
    assert [clock.log.count(name) for name in ("a", "failing", "b")] == [8, 3, 8]


@pytest.mark.parametrize("drop", [(), OSError])
def test_any_other_exception_ends_them_all(drop):
    def failing():
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake"):
        interleave({"a": lambda: [1.0] * 5, "b": failing}, AT_ONCE, drop=drop)


def warmed(seconds, **plan):
    """Warm up a step whose runs take these `seconds`, the last for ever."""
    clock, left = Clock(), chain(seconds, repeat(seconds[-1]))

    def step():
        clock.step("a", next(left))()

    settled = warm_up(step, LatencyPlan(**{"warmup": 0.0, "warmup_runs": 3, **plan}), clock)
    assert settled.seconds == pytest.approx(clock.now)
    return len(clock.log), settled.steady


def test_warm_up_lasts_for_both_its_runs_and_its_seconds():
    assert warmed([0.25], warmup=2.0) == (8, True)
    assert warmed([0.25], warmup=0.0, warmup_runs=5) == (5, True)


def test_warm_up_goes_on_until_the_runs_no_longer_change():
    """The first look is after three runs and finds 2 s and 1 s, the next after a fifth more time, 8.4 s: all is 1 s."""
    assert warmed([4.0, 2.0, 1.0], warmup_limit=60.0) == (5, True)
    falling = [0.8**run + 0.05 for run in range(400)]
    runs, steady = warmed(falling, warmup_limit=60.0)
    assert steady
    assert falling[runs - 1] < 0.06


def test_warm_up_goes_on_while_runs_become_slower_too():
    assert warmed([1.0, 1.0, 2.0], warmup_limit=60.0) == (4, True)


def test_warm_up_ends_at_its_limit():
    rising = [0.001 * 1.01**run for run in range(1000)]
    runs, steady = warmed(rising, warmup_runs=50, warmup_limit=1.0)
    assert not steady
    assert sum(rising[: runs - 1]) < 1.0 <= sum(rising[:runs])


def test_warm_up_without_a_limit_never_goes_on_beyond_its_time():
    assert warmed([4.0, 2.0, 1.0]) == (3, False)
    assert warmed([4.0, 2.0, 1.0], warmup_runs=1) == (1, False)  # one run cannot tell


def test_slow_runs_are_not_warmed_up_for_long():
    assert warmed([3.0, 2.0], warmup=0.5, warmup_limit=5.0) == (3, True)
    assert warmed([8.0, 4.0, 2.0], warmup=0.5, warmup_limit=5.0) == (3, False)


@pytest.mark.parametrize(("last", "steady"), [(1.04, True), (1.06, False), (0.96, True), (0.94, False)])
def test_steady_is_within_a_twentieth(last, steady):
    assert warmed([1.0, 1.0, last]) == (3, steady)


def test_steady_is_told_from_medians_of_the_last_thirds():
    """What was first does not count, nor do single slow runs."""
    assert warmed([9.0] * 5 + [1.0, 9.0, 1.0, 9.0, 1.0, 1.0], warmup_runs=11) == (11, True)
    assert warmed([2.0] * 5 + [1.0, 9.0, 1.0, 9.0, 2.0, 2.0], warmup_runs=11) == (11, False)


class Device(BoundRun):
    """Calls are submitted in 1/16 s each, and executed one after another in `seconds` each."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds
        self.free, self.groups, self.submitted = 0.0, [], 0

    def enqueue(self):
        self.clock.now += 1 / 16
        self.free = max(self.free, self.clock.now) + self.seconds
        self.submitted += 1

    def wait(self):
        self.clock.now = max(self.clock.now, self.free)
        self.groups.append(self.submitted)
        self.submitted = 0


def test_throughput_counts_calls_that_overlap():
    """Four calls of half a second take 2 s and the submission of the first; a call alone would take 9/16 s."""
    device = Device(clock := Clock(), 0.5)
    assert throughput(device, batch=8, in_flight=4, seconds=10.0, clock=clock) == pytest.approx(8 * 4 / (2 + 1 / 16))
    assert device.groups == [4] * (1 + 5)  # one is not counted


def test_throughput_alone_waits_for_each_call():
    device = Device(clock := Clock(), 0.5)
    assert throughput(device, batch=1, in_flight=1, seconds=10.0, clock=clock) == pytest.approx(16 / 9)
    assert set(device.groups) == {1}


def test_throughput_does_not_count_its_start():
    device = Device(clock := Clock(), 0.5)
    device.free = 60.0
    assert throughput(device, batch=8, in_flight=4, seconds=10.0, clock=clock) == pytest.approx(8 * 4 / (2 + 1 / 16))


def test_slow_calls_are_not_submitted_beyond_the_time():
    """A CPU's: submitting one is running it."""
    clock = Clock()
    step = BoundRun(clock.step("a", 2.0))
    assert throughput(step, batch=3, in_flight=16, seconds=5.0, clock=clock) == pytest.approx(3 / 2.0)
    assert len(clock.log) == 3 + 3
    clock.log.clear()
    assert throughput(step, batch=3, in_flight=2, seconds=5.0, clock=clock) == pytest.approx(3 / 2.0)
    assert len(clock.log) == 2 + 3
    clock.log.clear()
    assert throughput(step, batch=3, in_flight=16, seconds=0.0, clock=clock) == pytest.approx(3 / 2.0)
    assert len(clock.log) == 1 + 1
