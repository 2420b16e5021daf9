"""bench.lab.bf16_step: a step is timed only where the gradients of its layers are right."""

import json

import pytest

from bench.lab import bf16_step
from tests.conftest import assert_one_line_error, run_here

SCRIPT = ("-m", "bench.lab.bf16_step")


def benched(tmp_path, monkeypatch, *flags):
    monkeypatch.setattr("pmm.training.precision.cpu_has_bf16", lambda: True)  # on another it is emulated
    flags = ("--device", "cpu", "--threads", "1", "--out", tmp_path / "found.json", *flags)
    done = run_here(*SCRIPT, *flags, PMM_FAST="1")
    return done, json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_both_precisions_are_timed_in_turns(tmp_path, monkeypatch):
    done, report = benched(tmp_path, monkeypatch, "--clock", "cpu")
    assert done.returncode == 0, done.stderr
    assert report["equal"] is True
    assert report["precisions"] == {"fp32": "fp32", "bf16": "bf16"}
    cosines = report["cosines"]
    assert 0.99 < cosines["least"] <= cosines["median"] <= 1.0001
    assert {"backbone.trunk.conv1", "bottleneck.conv2", "stages.2.classifier"} <= set(cosines["layers"])
    times = {name: row["p50_ms"] for name, row in report["rows"].items()}
    assert report["ratio"]["ratio"] == pytest.approx(times["bf16"] / times["fp32"])
    assert f"bf16 over fp32: {report['ratio']['ratio']:.2f}" in done.stdout
    whole = report["whole step"]
    assert whole["trained"] == 1
    assert -1 <= whole["least"] <= whole["median"] <= 1.0001
    assert f"{whole['median']:.5f}" in done.stdout


def test_wrong_gradients_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bf16_step, "MIN_COSINE", 1.01)
    done, report = benched(tmp_path, monkeypatch)
    assert done.returncode == 1
    assert report["equal"] is False
    assert "rows" not in report
    assert "not timed" in done.stdout


@pytest.mark.parametrize(
    ("ratio", "speedup", "code"),
    [(0.6, None, 0), (0.61, None, 1), (0.61, 2.0, 1), (0.61, 1.9, 0), (0.61, 0.5, 0), (0.5, 2.0, 0)],
)
def test_a_missed_target_is_an_error_where_products_are_fast(tmp_path, monkeypatch, ratio, speedup, code):
    report = {
        "step": {"preset": "paper", "backbone": "resnet50", "batch": 8}, "device": "here", "clock": "wall",
        "cosines": {"median": 1.0, "least": 1.0}, "whole step": {"trained": 10, "median": 0.5}, "equal": True,
        "speedup of a product": speedup, "rows": {}, "ratio": {"ratio": ratio, "interval": None},
    }  # fmt: skip
    monkeypatch.setattr(bf16_step, "bench_bf16", lambda command: report)
    done = run_here(*SCRIPT, "--out", tmp_path / "found.json", PMM_FAST="0")
    assert done.returncode == code
    assert ("expected 0.6 at most" in done.stdout) is bool(code)
    assert json.loads((tmp_path / "found.json").read_text()) == report
    assert run_here(*SCRIPT, "--out", tmp_path / "found.json", PMM_FAST="1").returncode == 0


def test_a_gpu_has_no_time_of_the_process(tmp_path):
    done = run_here(*SCRIPT, "--clock", "cpu", "--device", "cuda", "--out", tmp_path / "found.json")
    assert_one_line_error(done, "--clock is 'cpu'", "wall")
