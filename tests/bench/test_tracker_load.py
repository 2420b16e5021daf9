"""The load of a tracker: the calls are those that are said, and what changing sizes cost is seen."""

import numpy as np
import pytest

from pmm.bench import runner_factory
from pmm.bench.result_schema import Tracker
from pmm.bench.schema import read_report
from pmm.bench.tracker_load import measure_tracker_load
from tests.bench import faulty_worker
from tests.bench.workers import fewer, workers_here
from tests.conftest import run_here

CROPS = np.zeros((40, 2, 1, 3), np.uint8)


class Counted:
    """A runner that takes 1 ms per crop, by a clock of its own, and `change_ms` more when the number is another."""

    def __init__(self, change_ms=0.0):
        self.now, self.sizes, self.change_ms = 0.0, [], change_ms

    def __call__(self, crops):
        changed = self.sizes[-1:] != [len(crops)]
        self.sizes.append(len(crops))
        self.now += (len(crops) + self.change_ms * changed) / 1000

    def measure(self, seconds):
        return Tracker(**measure_tracker_load(self, CROPS, seconds, lambda: self.now))


def test_the_calls_are_drawn_evenly_and_are_always_the_same():
    runner, again = Counted(), Counted()
    found = runner.measure(1e9)
    assert found == again.measure(1e9)
    assert runner.sizes == again.sizes
    warm, drawn, in_order = runner.sizes[:40], runner.sizes[40:240], runner.sizes[240:]
    assert sorted(warm) == list(range(1, 41))
    assert in_order == sorted(drawn)
    assert (min(drawn), max(drawn), len(set(drawn)) > 35, found.calls) == (1, 40, True, 200)
    assert found.mean_ms == pytest.approx(np.mean(drawn))
    assert found.p99_ms == pytest.approx(40)
    assert found.images_per_s == pytest.approx(1000)
    assert found.in_order_images_per_s == pytest.approx(1000)


def test_what_a_change_of_size_costs_is_seen():
    found = Counted(change_ms=20.0).measure(1e9)
    assert found.images_per_s == pytest.approx(500, rel=0.1)
    assert found.in_order_images_per_s == pytest.approx(850, rel=0.1)


def test_a_slow_runner_gets_fewer_calls_and_the_same_ones_both_times():
    runner = Counted()
    found = runner.measure(0.5)
    warm, drawn = runner.sizes[: -2 * found.calls], runner.sizes[-2 * found.calls : -found.calls]
    assert warm == list(range(40, 40 - len(warm), -1))
    assert sum(warm[:-1]) < 500 <= sum(warm)
    assert 20 < found.calls < 30
    assert sum(drawn[:-1]) < 500 <= sum(drawn)
    assert runner.sizes[-found.calls :] == sorted(drawn)
    assert found.p99_ms is None


def test_a_runner_that_refuses_a_size_is_told_of_and_the_others_go_on(trained, exported, people, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_factory, "open_candidate", faulty_worker.open_faulty)
    file = tmp_path / "refuses-forty.onnx"
    file.write_bytes(exported.read_bytes())
    words = ("--batches", "1", "--seconds", "0.2", "--root", fewer(people, tmp_path / "people"))
    words += ("--wrong-preprocessing", "off")
    with workers_here():
        done = run_here("bench/run.py", trained, file, *words, "--out", tmp_path / "report", PMM_FAST="1")
    assert done.returncode == 1
    report = read_report(tmp_path / "report" / "report.json")
    torch, refusing = report.results
    assert (torch.tracker.least, torch.tracker.most) == (1, 40)
    assert (refusing.status, refusing.tracker, refusing.notes) == ("ok", None, ())
    (failure,) = report.gates.failures
    assert (failure.result, failure.gate) == (refusing.name, "--batches")
    assert "the tracker load could not be timed: no forty crops" in failure.message
    assert refusing.untimed == (failure.message,)
