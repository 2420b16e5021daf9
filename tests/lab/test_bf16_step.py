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


def test_wrong_gradients_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bf16_step, "MIN_COSINE", 1.01)
    done, report = benched(tmp_path, monkeypatch)
    assert done.returncode == 1
    assert report["equal"] is False
    assert "rows" not in report
    assert "not timed" in done.stdout


def test_a_gpu_has_no_time_of_the_process(tmp_path):
    done = run_here(*SCRIPT, "--clock", "cpu", "--device", "cuda", "--out", tmp_path / "found.json")
    assert_one_line_error(done, "--clock is 'cpu'", "wall")
