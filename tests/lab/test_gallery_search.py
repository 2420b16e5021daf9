"""bench.lab.gallery_search: every way to search is compared with brute force before any is timed."""

import json

import numpy as np
import pytest

from bench.lab import gallery_search
from bench.lab.earlier_search import earlier_search
from bench.lab.gallery_model import embedded_people, synthetic_people
from bench.lab.gallery_search import (
    BATCH,
    EARLIER,
    KERNEL,
    NUMPY,
    Found,
    bench,
    brute_force,
    is_right,
    markdown,
    missed,
)
from pmm.bench.latency import LatencyPlan
from pmm.utils.search_library import library
from tests.conftest import assert_one_line_error, run_here

PLAN = LatencyPlan(warmup=0, warmup_runs=1, samples=1, block=1, settle=0, lead=0)
WAYS = [EARLIER, NUMPY, *([KERNEL] if library() else [])]


def test_the_report(tmp_path):
    out, scratch = tmp_path / "search.json", tmp_path / "scratch"
    scratch.mkdir()
    flags = ("--rounds", "2", "--scratch", scratch, "--out", out)
    done = run_here("-m", "bench.lab.gallery_search", *flags, PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["schema"] == "pmm-gallery-search-bench-1"
    assert [(row["way"], row["at_once"]) for row in report["rows_timed"]] == [(w, n) for n in (1, BATCH) for w in WAYS]
    for row in report["rows_timed"]:
        assert len(row["samples_ms"]) == 2
        assert row["queries_per_s"] == pytest.approx(1e3 * row["at_once"] / row["ms"])
        assert f"{row['speedup']['ratio']:.1f}" in done.stdout
    assert all(
        check == {"queries": 2 * BATCH, "other_rows": 0, "off_by": check["off_by"]}
        for check in report["checks"].values()
    )
    assert set(report["memory"]) == set(WAYS[1:])
    for memory in report["memory"].values():
        assert 0 <= memory["open_bytes"] <= memory["peak_bytes"] < 500e6
    assert report["earlier"] in done.stdout
    assert not list(scratch.iterdir())


def test_a_way_that_finds_other_rows_is_told_and_not_timed(tmp_path, monkeypatch):
    real = gallery_search.ways_to_search

    def with_a_fault(*args):
        ways = real(*args)
        numpy = ways[NUMPY]

        def swapped(queries):
            found = numpy(queries)
            return Found(found.rows[:, ::-1], found.distances)

        return {**ways, NUMPY: swapped}

    monkeypatch.setattr(gallery_search, "ways_to_search", with_a_fault)
    monkeypatch.setattr(
        gallery_search,
        "measured_apart",
        lambda *args: {"open_s": 0, "open_bytes": 0, "first_s": 0, "batch": 0, "peak_bytes": 0},
    )
    found = bench(synthetic_people(16, BATCH), 1200, tmp_path / "gallery", PLAN)
    assert missed(found) == []
    assert NUMPY not in [row["way"] for row in found["rows_timed"]]
    assert not is_right(found["checks"][NUMPY])
    assert f"{NUMPY} | wrong for {2 * BATCH} of {2 * BATCH}, not timed" in markdown(found)


def test_the_earlier_search_is_that_of_its_commit(tmp_path):
    before = earlier_search(tmp_path)
    if before is None:
        pytest.skip("no history here")
    assert before.distances.Rows  # has another name today
    assert before.nearest.Distances is before.distances.Distances


def test_a_requirement_that_is_missed_is_told():
    found = {
        "rows": 10**6,
        "gallery": {"fp32_bytes": 1000},
        "rows_timed": [
            {"way": NUMPY, "at_once": at_once, "speedup": {"ratio": 2.9}, "required": required}
            for at_once, required in ((1, 3.0), (BATCH, 2.3), (2, None))
        ],
        "resident": {NUMPY: 201, KERNEL: 200},
        "memory": {NUMPY: {"peak_bytes": 100}, KERNEL: {"peak_bytes": 300}},
    }
    assert [line.split(":")[0] for line in missed(found)] == [
        f"{NUMPY}, 1 at once",
        f"{NUMPY}, resident",
        f"{KERNEL}, peak",
    ]
    assert missed({**found, "rows": 10**6 - 1}) == []


def test_brute_force_in_parts_is_a_sort_of_all_distances():
    rng = np.random.default_rng(0)
    rows, queries = (rng.integers(0, 4, (count, 5)).astype(np.float32) for count in (700, 20))  # with ties
    exact = np.square(queries[:, None].astype(np.float64) - rows).sum(-1) / 2
    found = brute_force([rows[:9], rows[9:600], rows[600:]], queries)
    assert np.array_equal(found.rows, np.argsort(exact, axis=1, kind="stable")[:, :10])
    assert np.array_equal(found.distances, np.sort(exact, axis=1)[:, :10])


def test_people_of_a_trained_network(exported, people):
    found = embedded_people(exported, people, 20)
    assert found.queries.shape == (20, 384)
    rows = np.concatenate(list(found.rows(2000)))
    assert rows.shape == (2000, 384)
    assert np.array_equal(rows[: len(found.gallery)], found.gallery)


def test_bad_input_is_one_line(tmp_path):
    for args, text in ((("--rows", "9"), "--rows is 9"), (("--artifact", "a.onnx"), "--root")):
        assert_one_line_error(run_here("-m", "bench.lab.gallery_search", *args, "--out", tmp_path / "a.json"), text)
