"""bench.lab.saving: the files are compared before anything is timed."""

import json
import sys
import time

import pytest

import pmm.training.saver
from bench.lab import saving
from bench.lab.saving import CLONE, COPY, ON_DISK
from pmm.artifacts import checkpoint
from tests.conftest import run_here


def measured(out):
    return run_here("-m", "bench.lab.saving", "--preset", "tiny", "--out", out / "new" / "saving.json", PMM_FAST="1")


def test_every_way_is_timed_against_a_copy(tmp_path):
    done = measured(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new" / "saving.json").read_text())
    assert report["schema"] == "pmm-saving-bench-1"
    assert report["equal"] is True
    assert report["bytes"]["last.pth"] > 2 * report["bytes"]["best.pth"] > 1_000_000
    assert [row["name"] for row in report["rows"]] == [COPY, CLONE, "last.pth", "best.pth", ON_DISK]
    copied = report["rows"][0]["ms"]
    for row in report["rows"]:
        assert len(row["samples_ms"]) == 2
        assert row["over"][COPY]["ratio"] == pytest.approx(row["ms"] / copied)
        assert f"| {row['name']} | " in done.stdout
    assert len(report["longest_pause_ms"]) == 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saving.json"]


def test_a_file_that_differs_from_the_state_is_not_timed(tmp_path, monkeypatch):
    def late(path, state, save=checkpoint.save):
        time.sleep(0.2)  # until the step that follows has been taken
        save(path, state)

    monkeypatch.setattr(pmm.training.saver, "_copied", lambda buffers, place, value: value)
    monkeypatch.setattr(checkpoint, "save", late)
    done = measured(tmp_path)
    assert done.returncode == 1
    report = json.loads((tmp_path / "new" / "saving.json").read_text())
    assert (report["equal"], report["rows"]) == (False, [])


@pytest.mark.parametrize(("last", "fast", "code"), [(1.4, "0", 0), (1.6, "0", 1), (1.6, "1", 0)])
def test_a_save_that_costs_too_much_is_told(tmp_path, monkeypatch, capsys, last, fast, code):
    costs = {COPY: 1.0, CLONE: 3.0, "last.pth": last, "best.pth": 0.5, ON_DISK: 40.0}
    rows = [
        {"name": name, "ms": ratio, "over": {base: {"ratio": ratio, "interval": None} for base in (COPY, CLONE)}}
        for name, ratio in costs.items()
    ]
    report = {"preset": "tiny", "limit": saving.LIMIT, "equal": True, "rows": rows, "longest_pause_ms": []}
    monkeypatch.setattr(saving, "bench_saving", lambda *args: report)
    monkeypatch.setattr(sys, "argv", ["saving", "--out", str(tmp_path / "saving.json")])
    monkeypatch.setenv("PMM_FAST", fast)
    assert saving.main(saving.PROG) == code
    assert json.loads((tmp_path / "saving.json").read_text()) == report
    assert ("last.pth takes 1.60 times" in capsys.readouterr().out) == (last > saving.LIMIT)
