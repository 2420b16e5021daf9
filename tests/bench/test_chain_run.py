"""pmm bench --gallery on a small model: the chain in report and pages, thresholds in the manifest, a larger gallery."""

import json
import shutil
from types import SimpleNamespace

import pytest

from pmm.artifacts.artifact import manifest_path, read_manifest
from pmm.artifacts.measured_thresholds import MeasuredPoint, as_metric
from pmm.bench.chain.index_builder import INDEXES
from pmm.bench.chain_run import _deployed, check_chain
from pmm.bench.chain_schema import INDEX_NAMES
from pmm.bench.request import ChainOptions
from pmm.bench.result_schema import OperatingPoint, Thresholds
from pmm.bench.schema import read_report
from pmm.utils.errors import ConflictingOptions, InvalidInput, InvalidValue, UserError
from tests.bench.chain.test_measure import add_up
from tests.bench.workers import fewer, workers_here
from tests.conftest import run_here
from tests.refusals import refuses

SCRIPT = "bench/run.py"
OFF = ("--max-rank1-flips", "off", "--max-map-drop", "off", "--max-tpr-drop", "off", "--max-fmr-factor", "off")


@pytest.fixture(scope="module")
def chain_run(trained, exported, tmp_path_factory):
    """A run on the whole small data set, of the checkpoint and one file, with every index that is installed."""
    home = tmp_path_factory.mktemp("chain")
    artifact = home / "model.onnx"
    shutil.copyfile(exported, artifact)
    shutil.copyfile(manifest_path(exported), manifest_path(artifact))
    out = home / "report"
    command = (SCRIPT, trained, artifact, "--batches", "1", "--seconds", "0.2", "--out", out, "--gallery", *OFF)
    with workers_here(pages=True):
        done = run_here(*command, "--wrong-preprocessing", "off", "--target-fmr", "0.01", PMM_FAST="1")
    assert done.returncode == 0, done.stderr + done.stdout
    return out, artifact, done.stdout


@pytest.mark.slow
def test_the_report_has_every_link_and_their_losses_add_up(chain_run):
    out, _, printed = chain_run
    report = read_report(out / "report.json")
    chain = report.chain
    names = ["torch fp32", "ort-cpu fp32 model.onnx", "stored fp32", "stored fp16", "stored int8", *INDEX_NAMES]
    assert [link.name for link in chain.links] == names
    add_up(chain)
    assert not [link.findings for link in chain.links if link.findings]
    for name, result in zip(names, report.results, strict=False):
        link = chain.link(name)
        assert (link.mAP, link.rank1, link.mINP) == pytest.approx((result.mAP, result.rank1, result.mINP))
    artifact, certified = chain.link(names[1]), chain.link("certified")
    (point,) = (point for point in report.results[1].thresholds.points if point.fmr == chain.target_fmr)
    assert (artifact.tpr, chain.threshold) == (point.tpr, point.threshold)
    assert certified.loss.map_delta == certified.loss.rank1_lost == certified.loss.newly_accepted == 0
    assert certified.loss.top10_overlap == 1
    assert chain.link("certified-fp16").loss.map_delta == 0
    assert min(certified.alone_per_s, certified.batch_per_s, certified.build_s, certified.disk_bytes) > 0
    assert [link.name for link in chain.path("certified")] == [*names[:3], "certified"]
    assert "certified" in printed
    for page in ("report.html", "report.md"):
        text = (out / page).read_text()
        assert "From the checkpoint to the index" in text
        assert "certified-fp16" in text


@pytest.mark.slow
def test_thresholds_are_beside_the_file_with_what_they_were_measured_on(chain_run):
    out, artifact, _ = chain_run
    report = read_report(out / "report.json")
    (measured,) = read_manifest(artifact).thresholds
    assert (measured.precision, measured.metric) == ("fp32", "euclidean")
    assert (measured.data, measured.data_digest) == (report.dataset.name, report.dataset.digest)
    of_result = report.results[1].thresholds
    assert (measured.genuine, measured.impostor) == (of_result.genuine, of_result.impostor)
    points = [point for point in of_result.points if point.threshold is not None]
    assert [(p.fmr, p.distance, p.tpr) for p in measured.points] == [(p.fmr, p.threshold, p.tpr) for p in points]


@pytest.mark.slow
def test_an_older_report_is_read(chain_run, tmp_path):
    out, _, _ = chain_run
    older = json.loads((out / "report.json").read_text())
    del older["chain"], older["gates"]["max_fmr_factor"], older["gates"]["max_tpr_drop"]
    (tmp_path / "report.json").write_text(json.dumps(older))
    assert read_report(tmp_path / "report.json").chain is None


@pytest.mark.slow
def test_the_gallery_grows_by_made_up_people(trained, exported, people, tmp_path):
    out, artifact = tmp_path / "report", tmp_path / "model.onnx"
    shutil.copyfile(exported, artifact)  # without a manifest beside it
    command = (SCRIPT, trained, artifact, "--batches", "1", "--seconds", "0.2", "--out", out, *OFF, "--gallery")
    command += (
        "--root",
        fewer(people, tmp_path / "people", ids=8),
        "--wrong-preprocessing",
        "off",
        "--target-fmr",
        "0.01",
    )
    with workers_here():
        done = run_here(*command, "--gallery-size", "5000", "--indexes", "certified", PMM_FAST="1")
    assert done.returncode == 0, done.stderr + done.stdout
    report = read_report(out / "report.json")
    chain = report.chain
    assert (chain.gallery, chain.distractors) == (5000, 5000 - report.dataset.gallery)
    assert [link.kind for link in chain.links] == [
        "checkpoint",
        "artifact",
        "stored",
        "list",
        "stored",
        "stored",
        "index",
    ]
    assert chain.links[0].mAP < report.results[0].mAP
    certified = chain.link("certified")
    assert certified.parent == "first 1,000 of stored fp32"
    assert (certified.loss.map_delta, certified.loss.newly_rejected) == (0, 0)
    assert [share for share, _, _ in chain.impostor_quantiles] == [0.01, 0.05, 0.25, 0.5]
    assert not manifest_path(artifact).exists()


def split_of(identities, crops, train=5):
    people = [SimpleNamespace(pid=pid) for pid in range(identities)]
    return SimpleNamespace(
        query=people, gallery=people * crops, train=[SimpleNamespace(pid=pid) for pid in range(train)]
    )


def test_a_data_set_that_is_too_small_is_refused_before_anything_is_measured():
    check_chain(ChainOptions(), split_of(2, 1))
    check_chain(ChainOptions(gallery=True), split_of(50, 5))
    check_chain(ChainOptions(gallery=True, target_fmr=1e-2), split_of(20, 4))
    with refuses(InvalidInput, "1,520", "0.001", expected="10,000", hint="--target-fmr 0.01"):
        check_chain(ChainOptions(gallery=True), split_of(20, 4))
    with refuses(InvalidInput, "450", expected="10,000", hint="leave --gallery out"):
        check_chain(ChainOptions(gallery=True), split_of(10, 5))
    with refuses(InvalidValue, "80", name="--gallery-size", value=80):
        check_chain(ChainOptions(gallery=True, target_fmr=1e-2, gallery_size=80), split_of(20, 4))
    with refuses(InvalidInput, "2 identities", expected="3"):
        check_chain(ChainOptions(gallery=True, target_fmr=1e-2, gallery_size=100), split_of(20, 4, train=2))


def test_no_other_rate_is_taken_for_the_one_that_was_asked_for():
    points = (operating_point(1e-2, 1.5, 0.5), operating_point(1e-3, -1, 0))
    result = SimpleNamespace(name="r", thresholds=thresholds_with(points))
    assert _deployed(result, 1e-2) == MeasuredPoint(fmr=1e-2, distance=1.5, tpr=0.5)
    for rate in (1e-3, 1e-4):
        with refuses(UserError, f"{rate:g}", hint="--target-fmr"):
            _deployed(result, rate)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_points_that_cannot_be_used_are_in_no_manifest_and_no_gallery(metric):
    usable, zero = (1e-2, 1.5, 0.5), (1e-3, 0.0, 0.25)
    rest = ((1e-4, None, None), (1e-5, -1.0, 0.0), (1e-6, 0.5, None))
    measured = thresholds_with(tuple(operating_point(*each) for each in (usable, zero, *rest))).measured(metric)
    distance = 1.5**2 / 2 if metric == "cosine" else 1.5
    assert [(point.fmr, point.distance, point.tpr) for point in measured] == [(1e-2, distance, 0.5), zero]


def operating_point(fmr, threshold, tpr):
    return OperatingPoint(fmr=fmr, threshold=threshold, tpr=tpr, flips=0, newly_accepted=0, newly_rejected=0)


def thresholds_with(points):
    return Thresholds(genuine=1, impostor=1, eer=0.1, eer_threshold=1.0, points=points)


def test_options_of_the_chain():
    assert ChainOptions().names == INDEX_NAMES == tuple(INDEXES)
    options = ChainOptions(gallery=True, indexes="hnsw-64,certified")
    assert options.names == ("hnsw-64", "certified")
    assert options.required == ("stored fp32", "certified", "hnsw-64")
    assert ChainOptions(gallery=True, indexes="all").required == ("stored fp32", "certified")
    for flags in ({"gallery_size": 10}, {"indexes": "all"}, {"target_fmr": 1e-4}):
        with refuses(ConflictingOptions, "--gallery", hint="--gallery"):
            ChainOptions(**flags)
    with refuses(InvalidValue, name="indexes", value="hnsw-65", hint="hnsw-64"):
        ChainOptions(gallery=True, indexes="hnsw-65")
    with refuses(InvalidValue, "0.001", name="target_fmr", value=0.5):
        ChainOptions(gallery=True, target_fmr=0.5)


def test_a_distance_at_norm_1_is_1_less_the_cosine():
    assert as_metric(2.0, "euclidean") == 2
    assert as_metric(2**0.5, "cosine") == pytest.approx(1)
