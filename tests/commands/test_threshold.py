"""pmm threshold: where the distance comes from, what is written into the gallery, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.preprocessing import Preprocessing
from pmm.gallery.camera_negatives import put_thresholds, threshold_from_cameras
from pmm.gallery.gallery import Gallery
from pmm.gallery.search_options import threshold_of
from pmm.gallery.storage.source import EmbeddingSource
from pmm.gallery.storage.thresholds import Threshold
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue
from tests.bench.pages.sample_reports import cpu_machine
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

DIM, PARTIES, PARTY, MOMENTS = 8, 60, 4, 3
PEOPLE = PARTIES * PARTY
SEEN = ("--negatives-from-cameras", "--stretch", "700")


def crops(metric="euclidean", precision="fp32"):
    """Parties of four people, each before one of two cameras at three moments."""
    rng = np.random.default_rng(0)
    person = np.tile(np.arange(PEOPLE), MOMENTS)
    moment = np.arange(MOMENTS).repeat(PEOPLE)
    party = person // PARTY
    embeddings = rng.normal(size=(PEOPLE, DIM))[person] + 0.4 * rng.normal(size=(len(person), DIM))
    columns = {"camera": (party % 2).astype(str).tolist(), "time": 1000.0 * party + moment, "person": person}
    return embeddings.astype(np.float32), np.arange(len(person)), {"metric": metric, "columns": columns}, precision


@pytest.fixture(params=["euclidean", "cosine"])
def gallery(request, tmp_path):
    embeddings, ids, rest, precision = crops(request.param)
    return Gallery.create(tmp_path / "g", embeddings, ids, precision=precision, **rest)


def test_people_seen_at_once_give_the_gallery_a_threshold(gallery):
    done = run_here("-m", "pmm", "threshold", gallery.path, *SEEN, "--fmr", "0.1", "--people", "person")
    assert done.returncode == 0, done.stderr
    (written,) = Gallery.open(gallery.path).thresholds
    assert (written.fmr, written.kind, written.stored) == (0.1, "cameras", "fp32")
    assert 0 < written.upper <= 0.1
    assert f"{written.distance:.4f}" in done.stdout
    assert "60 stretches of time, 1,080 pairs" in done.stdout
    assert "people" not in written.data
    # by hand: the share of the pairs of each party
    rows = gallery.embeddings().astype(np.float64)
    if gallery.metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    shares = []
    for one in range(PEOPLE):
        for other in range(one + 1, (one // PARTY + 1) * PARTY):
            gaps = np.linalg.norm(rows[one::PEOPLE] - rows[other::PEOPLE], axis=1)
            gaps = gaps**2 / 2 if gallery.metric == "cosine" else gaps
            shares.append((gaps <= written.distance).mean())
    found = threshold_from_cameras(gallery, 0.1, people="person", stretch=700)
    assert 0 < found.estimate == pytest.approx(np.mean(shares))
    assert (found.distance, found.upper) == (written.distance, written.upper)
    assert found == threshold_from_cameras(gallery, 0.1, stretch=700), "nobody is seen twice at once"


def test_crops_that_cannot_count_are_left_out(tmp_path):
    embeddings, ids, rest, _ = crops()
    rest["columns"]["time"][:40] = np.nan
    who = rest["columns"]["person"].astype(np.float64)
    who[80:120:2] = np.nan
    who[120:160:2] = -1
    counted = np.isfinite(who) & (who != -1) & (ids >= 80)
    gallery = Gallery.create(
        tmp_path / "g", embeddings, ids, columns={**rest["columns"], "who": who, "pid": np.nan_to_num(who, nan=-1)}
    )
    gallery.remove(ids[40:80])
    kept = {name: np.asarray(values)[counted] for name, values in rest["columns"].items()}
    other = Gallery.create(tmp_path / "h", embeddings[counted], ids[counted], columns=kept)
    expected = threshold_from_cameras(other, 0.2, people="person", stretch=700)
    for name in ("who", "pid"):
        assert threshold_from_cameras(gallery, 0.2, people=name, stretch=700) == expected


def test_too_few_stretches_leave_the_gallery_as_it_was(gallery):
    before = gallery.manifest
    done = run_here("-m", "pmm", "threshold", gallery.path, *SEEN)
    assert_one_line_error(done, "too few", "60 stretches", "0.001", "3,")
    assert Gallery.open(gallery.path).manifest == before


def test_a_given_distance_takes_the_place_of_one_for_that_rate_alone(tmp_path):
    gallery = Gallery.create(tmp_path / "g", np.eye(3), [1, 2, 3])
    for distance, rate in (("0.5", "0.01"), ("0.25", "0.001"), ("0.75", "0.01")):
        done = run_here("-m", "pmm", "threshold", gallery.path, "--set", distance, "--fmr", rate)
        assert done.returncode == 0, done.stderr
    assert "note: it replaces the threshold 0.5000 for a false match rate of 0.01 (as given)" in done.stderr
    found = {each.fmr: (each.distance, each.kind) for each in Gallery.open(gallery.path).thresholds}
    assert found == {0.001: (0.25, "given"), 0.01: (0.75, "given")}


def run(gallery, *flags):
    return run_here("-m", "pmm", "threshold", gallery.path, *flags)


def test_a_distance_without_a_rate_replaces_nothing_that_was_measured(tmp_path):
    gallery = Gallery.create(tmp_path / "g", np.eye(3), [1, 2, 3])
    assert run(gallery, "--set", "1.2").stdout.endswith("threshold 1.2000, as given\n")
    assert threshold_of(Gallery.open(gallery.path), "auto", None)[0] == 1.2
    with refuses(InvalidValue, "without a rate", name="--fmr"):
        threshold_of(Gallery.open(gallery.path), "auto", 0.1)
    run(gallery, "--set", "1", "--fmr", "0.1")
    run(gallery, "--set", "1.1", "--fmr", "0.2")
    done = run(gallery, "--set", "1.3")
    assert "replaces the threshold 1.2000 (as given)" in done.stderr
    now = Gallery.open(gallery.path)
    assert [(each.fmr, each.distance) for each in now.thresholds] == [(0.1, 1.0), (0.2, 1.1), (None, 1.3)]
    assert threshold_of(now, "auto", None)[0] == now.threshold().distance == 1.3
    assert threshold_of(now, "auto", 0.1)[0] == 1.0


def test_thresholds_are_removed(tmp_path):
    gallery = Gallery.create(tmp_path / "g", np.eye(3), [1, 2, 3])
    assert_one_line_error(run(gallery, "--remove"), "no threshold")
    for flags in (["--fmr", "0.1"], ["--fmr", "0.2"], []):
        run(gallery, "--set", "1", *flags)
    assert_one_line_error(run(gallery, "--remove", "--fmr", "0.5"), "--fmr is 0.5")
    assert (
        "threshold 1.0000 for a false match rate of 0.1 removed, 2 left"
        in run(gallery, "--remove", "--fmr", "0.1").stdout
    )
    assert [each.fmr for each in Gallery.open(gallery.path).thresholds] == [0.2, None]
    assert run(gallery, "--remove").returncode == 0
    assert not Gallery.open(gallery.path).thresholds


def test_a_distance_that_no_pair_has_is_refused(tmp_path):
    cosine = Gallery.create(tmp_path / "g", np.eye(3), [1, 2, 3], "cosine")
    assert_one_line_error(run(cosine, "--set", "2.1"), "--set is 2.1", "at most 2")
    of_norm_1 = dataclasses.replace(SOURCE, embedding=EmbeddingContract(dim=4, normalised=True))
    unit = Gallery.create(tmp_path / "h", np.eye(4), [1, 2, 3, 4], source=of_norm_1)
    assert_one_line_error(run(unit, "--set", "1e9"), "at most 2")
    assert run(unit, "--set", "2").returncode == 0


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ([], ("--negatives-from-cameras", "--from", "--set")),
        (["--set", "1", "--negatives-from-cameras"], ("--set", "--negatives-from-cameras")),
        (["--set", "-1"], ("--set", "0 or more")),
        (["--set", "nan"], ("--set", "a number")),
        (["--set", "1", "--fmr", "2"], ("--fmr", "2")),
        ([*SEEN, "--confidence", "1"], ("--confidence",)),
        ([*SEEN, "--confidence", "0.5"], ("--confidence",)),
        (["--negatives-from-cameras", "--stretch", "0"], ("--stretch",)),
        (["--negatives-from-cameras"], ("--stretch", "how long")),
        ([*SEEN, "--same-time", "-1"], ("--same-time",)),
        ([*SEEN, "--same-time", "200"], ("--same-time", "--stretch")),
        ([*SEEN], ("camera", "--names", "--metadata")),
        (["--from", "none.json"], ("none.json: it does not exist", "report")),
        (["--from", "."], ("report",)),
        (["--set", "1", "--remove"], ("--set", "--remove")),
        (["--set", "1", "--people", "pid"], ("--people", "--set")),
        (["--set", "1", "--same-time", "0"], ("--same-time", "--set")),
        (["--remove", "--stretch", "1"], ("--stretch", "--remove")),
        (["--from", "none.json", "--confidence", "0.9"], ("--confidence", "--from")),
    ],
)
def test_refusals(tmp_path, flags, facts):
    gallery = Gallery.create(tmp_path / "g", np.eye(3), [1, 2, 3])
    assert_one_line_error(run_here("-m", "pmm", "threshold", gallery.path, *flags), *facts)
    assert not Gallery.open(gallery.path).thresholds


def test_columns_that_cannot_be(tmp_path):
    columns = {"camera": ["a", "a"], "time": [0.0, 0.0], "path": ["x", "x"], "one": ["p", "q"], "same": ["p", "p"]}
    gallery = Gallery.create(tmp_path / "g", np.eye(2), [1, 2], columns=columns)
    for name in ("who", "time", "path"):
        with refuses(InvalidValue, name="--people", value=name):
            threshold_from_cameras(gallery, 0.1, people=name, stretch=9)
    with refuses(InvalidValue, "one name", name="--people", value="one"):
        threshold_from_cameras(gallery, 0.1, people="one", stretch=9)
    with refuses(InvalidFile, "no two people", "--same-time", path=gallery.path):
        threshold_from_cameras(gallery, 0.1, people="same", stretch=9)
    with refuses(InvalidFile, "camera", path=tmp_path / "h"):
        threshold_from_cameras(Gallery.create(tmp_path / "h", np.eye(2), [1, 2]), 0.1, stretch=9)


def test_two_crops_at_one_time_are_one_stretch(tmp_path):
    columns = {"camera": ["a", "a"], "time": [0.0, 0.0]}
    gallery = Gallery.create(tmp_path / "g", np.eye(2), [1, 2], columns=columns)
    found = threshold_from_cameras(gallery, 0.1, stretch=9)
    assert (found.stretches, found.pairs, found.distance) == (1, 1, None)
    alike = Gallery.create(tmp_path / "h", np.ones((2, 2)), [1, 2], columns=columns)
    assert_one_line_error(run(alike, *SEEN), "distance 0", "--people")


SOURCE = EmbeddingSource(
    checkpoint_sha256="a" * 64, artifact_sha256="b" * 64, precision="fp32",
    embedding=EmbeddingContract(dim=4),
    preprocessing=Preprocessing(height=8, width=4, mean=(0.5,) * 3, std=(0.5,) * 3),
)  # fmt: skip


def test_of_another_model_is_refused(tmp_path):
    gallery = Gallery.create(tmp_path / "g", np.eye(4), [1, 2, 3, 4], source=SOURCE)
    own = Threshold(
        fmr=0.1, distance=1.0, kind="given", precision="fp32", stored="fp32", checkpoint_sha256=SOURCE.checkpoint_sha256
    )
    for change in ({"checkpoint_sha256": "c" * 64}, {"precision": "int8"}, {"stored": "fp16"}):
        with refuses(InvalidInput):
            put_thresholds(gallery, [dataclasses.replace(own, **change)])
    put_thresholds(gallery, [own])
    assert gallery.thresholds == (own,)
    json.dumps(dataclasses.asdict(own))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_of_a_report_are_taken_those_of_the_precision_that_made_the_gallery(tmp_path, metric):
    report = cpu_machine()
    (tmp_path / "report.json").write_text(report.to_json())
    of_report = dataclasses.replace(
        SOURCE, checkpoint_sha256=report.checkpoint.sha256, precision="int8",
        embedding=EmbeddingContract(dim=4, metric=metric),
    )  # fmt: skip
    gallery = Gallery.create(tmp_path / "g", np.eye(4), [1, 2, 3, 4], source=of_report)
    done = run_here("-m", "pmm", "threshold", gallery.path, "--from", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    measured = report.result("openvino int8").thresholds.points
    written = Gallery.open(gallery.path).thresholds
    assert [each.fmr for each in written] == [point.fmr for point in measured if point.threshold is not None]
    for threshold, point in zip(written, measured, strict=False):
        expected = point.threshold**2 / 2 if metric == "cosine" else point.threshold
        assert threshold.distance == pytest.approx(expected)
        assert (threshold.tpr, threshold.kind, threshold.precision) == (point.tpr, "bench", "int8")
    none = run_here("-m", "pmm", "threshold", gallery.path, "--from", tmp_path / "report.json", "--fmr", "0.5")
    assert_one_line_error(none, "report.json", "0.5")
    other = Gallery.create(
        tmp_path / "h", np.eye(4), [1, 2, 3, 4], source=dataclasses.replace(of_report, precision="tf32")
    )
    done = run_here("-m", "pmm", "threshold", other.path, "--from", tmp_path / "report.json")
    assert_one_line_error(done, "report.json", "tf32")
    half = Gallery.create(tmp_path / "j", np.eye(4), [1, 2, 3, 4], source=of_report, precision="fp16")
    assert_one_line_error(run(half, "--from", tmp_path / "report.json"), "fp16", "fp32", "--set")
    nobody = Gallery.create(tmp_path / "i", np.eye(4), [1, 2, 3, 4])
    done = run_here("-m", "pmm", "threshold", nobody.path, "--from", tmp_path / "report.json")
    assert_one_line_error(done, "what made its embeddings", "--set")
