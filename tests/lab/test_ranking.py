"""bench.lab.ranking: the result is compared with brute force before anything is timed."""

import json

import numpy as np
import pytest

from bench.lab import ranking
from bench.lab.ranking import KINDS, MARKET, PRODUCT, bench_market, markdown, synthetic_embeddings
from pmm.bench.latency import LatencyPlan
from pmm.evaluation.metrics import evaluate_ranking
from tests.conftest import assert_one_line_error, run_here

SMALL = MARKET._replace(queries=200, gallery=1500, identities=60, distractors=100)
PLAN = LatencyPlan(warmup=0, warmup_runs=1, samples=2, block=1, settle=0, lead=0)


def test_the_report(tmp_path):
    out = tmp_path / "ranking.json"
    done = run_here("-m", "bench.lab.ranking", "--rounds", "2", "--rerank", "--out", out, PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["schema"] == "pmm-ranking-bench-1"
    for setting, kind in zip(report["market"]["settings"], KINDS, strict=True):
        assert setting["embeddings"] == kind
        assert setting["off_by"] <= 1e-9
        assert [row["name"] for row in setting["rows"]] == [PRODUCT, "evaluation"]
        assert all(len(row["samples_ms"]) == 2 for row in setting["rows"])
        assert setting["rows"][1]["ratio"] == pytest.approx(setting["rows"][1]["ms"] / setting["rows"][0]["ms"])
    assert [row["name"] for row in report["msmt17"]["rows"]] == ["evaluation", "re-ranking and evaluation"]
    for row in report["msmt17"]["rows"]:
        assert 0 < row["mAP"] <= 1
        assert row["bytes_above"] is None or 0 <= row["bytes_above"] < 2e9
        assert f"| {row['name']} | " in done.stdout


def test_a_wrong_result_is_told_and_not_timed(monkeypatch):
    def wrong(*args, **options):
        result = evaluate_ranking(*args, **options)
        result.per_query_ap[3] += 1e-6
        return result

    monkeypatch.setattr(ranking, "evaluate_ranking", wrong)
    found = bench_market(PLAN, size=SMALL, dim=32)
    assert all(setting["rows"] == [] and setting["off_by"] == pytest.approx(1e-6) for setting in found["settings"])
    assert "wrong by 1e-06, not timed" in markdown({"market": found, "msmt17": None})


def test_synthetic_embeddings_are_like_a_trained_networks():
    data = synthetic_embeddings(SMALL, 256)
    assert (data.query.min(), data.query.dtype) == (0, np.float32)
    assert 0.6 < evaluate_ranking(*data).mAP < 0.99
    assert evaluate_ranking(*synthetic_embeddings(SMALL, 256, KINDS[1])).mAP < 0.1
    assert (data.gallery_pids[:100] == 0).all()


def test_bad_input_is_one_line(tmp_path):
    for args, text in ((("--memory-limit", "2"), "--memory-limit is '2'"), (("--rounds", "-1"), "--rounds is -1")):
        assert_one_line_error(run_here("-m", "bench.lab.ranking", *args, "--out", tmp_path / "a.json"), text)
