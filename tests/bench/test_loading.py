"""bench/loading.py: what is timed loads the same crops as PIL does, and what does not is named instead."""

import json

import pytest

import pmm.data.crops
from pmm.bench import loading
from pmm.bench.loading import BARE, IMAGES, KEPT, LOADER, THREADS, bench_loading, loading_plan, markdown
from pmm.errors import UserError
from tests.conftest import assert_one_line_error, run_here


@pytest.fixture
def one_setting(monkeypatch):
    monkeypatch.setattr(loading, "PRESETS", ("tiny",))


def test_every_way_is_timed_and_compared_with_the_bare_loop(people, tmp_path, one_setting):
    out = tmp_path / "loading.json"
    done = run_here(
        "bench/loading.py", "--data", people / "query", "--workers", "2", "--batches", "3", "--out", out, PMM_FAST="1"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["schema"] == "pmm-loading-bench-1"
    assert report["environment"]["cores"] >= 1
    assert report["environment"]["versions"]["pillow"]
    assert (report["workers"], report["files"]) == (2, len(list((people / "query").glob("*.jpg"))))
    (setting,) = report["settings"]
    assert (setting["height"], setting["width"], setting["crops"], setting["wrong"]) == (128, 64, 96, [])
    assert [row["name"] for row in setting["rows"]] == [BARE, KEPT, LOADER, IMAGES, THREADS]
    for row in setting["rows"]:
        assert len(row["samples_ms"]) == 2
        assert row["us_per_crop"] == pytest.approx(1000 * max(row["samples_ms"]) / 96, rel=1e-3)
        assert row["ratio"] == pytest.approx(row["us_per_crop"] / setting["rows"][0]["us_per_crop"])
        assert row["interval"] is None
    for name in (BARE, KEPT, LOADER, IMAGES, THREADS):
        assert f"| 128x64: {name} | " in done.stdout


def test_wrong_crops_are_named_and_nothing_is_timed(people, one_setting, monkeypatch):
    right = pmm.data.crops.load_crop

    def mirrored(*args):
        return right(*args)[:, ::-1]

    plan = loading_plan(1)
    monkeypatch.setattr(pmm.data.crops, "load_crop", mirrored)
    report = bench_loading(people / "query", workers=1, batches=1, plan=plan)
    assert report["settings"][0]["wrong"] == [THREADS]
    assert report["settings"][0]["rows"] == []
    assert f"| 128x64: {THREADS} | wrong crops | |" in markdown(report)
    monkeypatch.setattr("pmm.data.loader.load_crop", mirrored)
    assert bench_loading(people / "query", workers=1, batches=1, plan=plan)["settings"][0]["wrong"] == [LOADER, THREADS]


def test_bad_input_is_one_line(tmp_path):
    done = run_here("bench/loading.py", "--data", tmp_path, "--out", tmp_path / "a.json", PMM_FAST="1")
    assert_one_line_error(done, "holds no image")
    (tmp_path / "bad.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad\.jpg: not a readable image"):
        bench_loading(tmp_path, workers=1, batches=1, plan=loading_plan(1))
    done = run_here("bench/loading.py", "--rounds", "0", "--out", tmp_path / "a.json")
    assert_one_line_error(done, "--rounds")
