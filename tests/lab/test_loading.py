"""bench.lab.loading: what is timed loads the same crops as PIL does, and what does not is named instead."""

import json

import numpy as np
import pytest
from PIL import Image

import pmm.data.crops
from bench.lab import loading
from bench.lab.loading import BARE, IMAGES, LOADER, THREADS, TO_NUMPY, bench_loading, draw_files, loading_plan, markdown
from pmm.gallery.crop_files import images_below
from pmm.utils.errors import InvalidFile
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses


@pytest.fixture
def one_setting(monkeypatch):
    monkeypatch.setattr(loading, "PRESETS", ("tiny",))


def test_every_way_is_timed_and_compared_with_the_bare_loop(people, tmp_path, one_setting):
    out = tmp_path / "loading.json"
    done = run_here(
        "-m",
        "bench.lab.loading",
        "--data",
        people / "query",
        "--workers",
        "2",
        "--batches",
        "3",
        "--out",
        out,
        PMM_FAST="1",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["schema"] == "pmm-loading-bench-2"
    assert report["environment"]["cores"] >= 1
    assert report["environment"]["versions"]["pillow"]
    assert report["workers"] == 2
    (setting,) = report["settings"]
    assert (setting["files"], setting["file_count"]) == ("query", len(images_below(people / "query")))
    assert setting["file_bytes"] > 0
    assert (setting["height"], setting["width"], setting["crops"], setting["wrong"]) == (128, 64, 96, [])
    assert [row["name"] for row in setting["rows"]] == [BARE, TO_NUMPY, LOADER, IMAGES, THREADS]
    for row in setting["rows"]:
        assert len(row["samples_ms"]) == 2
        assert row["us_per_crop"] == pytest.approx(1000 * max(row["samples_ms"]) / 96, rel=1e-3)
        assert row["ratio"] == pytest.approx(row["us_per_crop"] / setting["rows"][0]["us_per_crop"])
        assert row["interval"] is None
    for name in (BARE, TO_NUMPY, LOADER, IMAGES, THREADS):
        assert f"| query to 128x64: {name} | " in done.stdout


def test_files_of_three_kinds_are_drawn(tmp_path):
    kinds = draw_files(tmp_path, ids=2, workers=2)
    assert list(kinds) == ["JPEG 128x64", "JPEG any size", "PNG any size"]
    images = {kind: [Image.open(path) for path in images_below(folder)] for kind, folder in kinds.items()}
    assert {image.size for image in images["JPEG 128x64"]} == {(64, 128)}
    for kind in ("JPEG any size", "PNG any size"):
        assert {image.format for image in images[kind]} == {kind.split()[0]}
        assert len(images[kind]) == len(images["JPEG 128x64"])
        assert len({image.size for image in images[kind]}) > len(images[kind]) / 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_without_a_number_of_batches_all_workers_have_as_many(people, one_setting, monkeypatch):
    assert loading.PASS == 1024
    monkeypatch.setattr(loading, "PASS", 128)
    report = bench_loading({"people": people / "query"}, workers=3, batches=0, plan=loading_plan(1, fast=True))
    assert report["settings"][0]["crops"] == 6 * 32  # at least 128 in batches of 32, a third for each worker


def test_wrong_crops_are_named_and_nothing_is_timed(people, one_setting, monkeypatch):
    def mirrored(right):
        return lambda *args: np.ascontiguousarray(np.asarray(right(*args))[:, ::-1])

    plan = loading_plan(1)
    monkeypatch.setattr(pmm.data.crops, "_pixels", mirrored(pmm.data.crops._pixels))
    report = bench_loading({"people": people / "query"}, workers=1, batches=1, plan=plan)
    assert report["settings"][0]["wrong"] == [THREADS]
    assert report["settings"][0]["rows"] == []
    assert f"| people to 128x64: {THREADS} | wrong crops | |" in markdown(report)
    monkeypatch.setattr("pmm.data.loader.load_crop", mirrored(pmm.data.crops.load_crop))
    assert bench_loading({"people": people / "query"}, workers=1, batches=1, plan=plan)["settings"][0]["wrong"] == [
        LOADER,
        THREADS,
    ]


def test_bad_input_is_one_line(tmp_path):
    done = run_here("-m", "bench.lab.loading", "--data", tmp_path, "--out", tmp_path / "a.json", PMM_FAST="1")
    assert_one_line_error(done, str(tmp_path), "no image")
    (tmp_path / "bad.jpg").write_bytes(b"")
    with refuses(InvalidFile, path=tmp_path / "bad.jpg"):
        bench_loading({"bad": tmp_path}, workers=1, batches=1, plan=loading_plan(1))
    done = run_here("-m", "bench.lab.loading", "--rounds", "0", "--out", tmp_path / "a.json")
    assert_one_line_error(done, "--rounds")
