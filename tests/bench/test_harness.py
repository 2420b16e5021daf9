"""Runs of the bench on a small model, in processes and with workers that live in the test's, and what they leave."""

import json
import shutil

import pytest

from pmm.artifacts.checkpoint import load
from pmm.artifacts.trained_model import read_model
from pmm.bench import latency_run
from pmm.bench.gates import GateFlags
from pmm.bench.harness import Bench
from pmm.bench.request import ChainOptions, Options, make_request
from pmm.bench.schema import read_report
from pmm.bench.workers import WorkerProcess
from pmm.config import Config
from pmm.export.options import ExportOptions
from pmm.models.registry import build_model
from pmm.utils.build_info import build_info, describe_build
from pmm.utils.environment import describe_environment
from pmm.utils.errors import InvalidFile
from tests.bench.workers import WorkerHere, exported_before, fewer, workers_here
from tests.conftest import run_here, run_python
from tests.refusals import refuses

SCRIPT = "bench/run.py"
ARGS = ("--backends", "torch,ort-cpu,openvino", "--precisions", "fp32,int8", "--batches", "1,3", "--seconds", "0.2")
WORKERS = {"torch fp32": WorkerProcess, "ort-cpu fp32": WorkerProcess}


@pytest.fixture(scope="module")
def exports(shared):
    with exported_before(shared, (ExportOptions(), ExportOptions(precision="int8", target="cpu"))) as asked:
        yield asked


@pytest.fixture(scope="module", params=["partly", pytest.param("wholly", marks=pytest.mark.slow)])
def bench_run(request, trained, tmp_path_factory):
    """A run of five results: wholly in processes, with exports of its own; or the two that matter most in processes,
    the other workers here, which takes a fraction of the time."""
    out = tmp_path_factory.mktemp("bench") / "report"
    # int8 on a model that was barely trained moves more than a trained one's would
    words = (SCRIPT, trained, *ARGS, "--out", out, "--max-rank1-flips", "off")
    if request.param == "wholly":
        done = run_python(*words, PMM_FAST="1")
    else:
        request.getfixturevalue("exports")
        with workers_here(
            lambda name, *args, **options: WORKERS.get(name, WorkerHere)(name, *args, **options), pages=True
        ):
            done = run_here(*words, PMM_FAST="1")
    assert done.returncode == 0, done.stderr + done.stdout
    return out, done.stdout


def test_report_json_has_what_others_rely_on(bench_run, trained):
    out, _ = bench_run
    report = json.loads((out / "report.json").read_text())
    names = ["torch fp32", "ort-cpu fp32", "ort-cpu int8", "openvino fp32", "openvino int8"]
    assert [result["name"] for result in report["results"]] == names
    for result in report["results"]:
        assert (result["status"], result["device"]) == ("ok", "cpu")
        assert result["precision"] == result["name"].split()[1]
        assert 0 < result["mAP"] <= 1
        assert 0 <= result["rank1"] <= 1
        low, high = result["map_delta_interval"]
        assert low <= result["map_delta"] <= high
        assert len(result["per_query_ap"]) == 72
        assert sum(camera["queries"] for camera in result["cameras"]) == 72 - result["skipped_queries"]
        assert result["thresholds"]["genuine"] > 0
        assert result["peak_memory"] > 50e6
        assert result["first_inference_s"] > 0
        assert [b["batch"] for b in result["batches"]] == [1, 3]
        for batch in result["batches"]:
            assert batch["p50_ms"] in batch["samples_ms"]
            assert batch["images_per_s"] > 0
            assert batch["p90_ms"] is None  # a short run has too few samples for it
            blocks, rest = divmod(len(batch["samples_ms"]), batch["block"])  # of 10 or, where a call is slow, of fewer
            assert blocks >= 1
            assert rest == 0
            assert len(batch["samples_ms"]) < 20
            assert 0 < batch["decode_ms"] < batch["end_to_end_ms"]
            assert batch["device_ms"] is None
    logs = {path.stem for path in (out / "logs").iterdir()}
    assert logs == {"builder", *(name.replace(" ", "_") for name in names)}
    torch, ort, int8, *_ = report["results"]
    assert (torch["map_delta"], torch["min_cosine"], torch["rank1_lost"]) == (0, 1, 0)
    assert torch["batches"][0]["speedup"] is None
    assert ort["min_cosine"] > 0.99999
    assert abs(ort["map_delta"]) < 1e-3
    assert ort["batches"][0]["speedup"]["value"] > 0
    assert 0.98 < int8["min_cosine"] < 0.99999
    assert "int8" in next(r for r in report["results"] if r["name"] == "openvino int8")["provider"]
    assert report["checkpoint"]["path"] == str(trained)
    assert report["dataset"]["queries"] == 72
    assert report["checkpoint"]["embedding_dim"] == 384
    config = Config.from_dict(load(trained)["config"])
    trained_numbers = sum(p.numel() for p in build_model(config).parameters())
    assert report["checkpoint"]["parameters_m"] == pytest.approx(trained_numbers / 1e6, abs=1e-9)
    assert report["timing"]["gflop_per_image"] > 0


def test_what_wrong_preprocessing_costs_is_measured_on_the_reference(bench_run, trained):
    out, printed = bench_run
    report = read_report(out / "report.json")
    reference, wrong = report.results[0], report.wrong_preprocessing
    assert (wrong.sample, wrong.queries, wrong.mAP, wrong.rank1) == (False, 72, reference.mAP, reference.rank1)
    assert [cost.reason for cost in wrong.costs] == ["", "", ""]
    assert wrong.costs[0].mistake == "BGR, not RGB"
    for cost in wrong.costs:
        assert cost.mAP == pytest.approx(wrong.mAP + cost.map_delta)
        low, high = cost.map_delta_interval
        assert low <= cost.map_delta <= high
    assert report.checkpoint.preprocessing == read_model(trained).preprocessing.describe()
    assert "(BGR, not RGB)" in printed
    assert "What wrong preprocessing costs" in (out / "report.html").read_text()


def test_mean_average_precision_is_the_evaluations(bench_run, trained, people, tmp_path):
    out, _ = bench_run
    done = run_here(
        "-m", "pmm", "evaluate", trained, "--dataset", "market1501", "--root", people, "--json", tmp_path / "e.json"
    )
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "e.json").read_text())
    reference = read_report(out / "report.json").results[0]
    assert reference.mAP == pytest.approx(evaluation["mAP"], abs=1e-6)
    assert reference.rank1 == pytest.approx(evaluation["rank1"], abs=1e-6)
    assert reference.mINP == pytest.approx(evaluation["mINP"], abs=1e-6)
    assert f"mAP {evaluation['mAP']:.1%}" in done.stdout


def test_pages_are_written_and_the_table_printed(bench_run):
    out, printed = bench_run
    assert "data:image/jpeg;base64," in (out / "report.html").read_text()
    assert "ort-cpu" in (out / "report.md").read_text()
    assert "| ort-cpu" in printed
    assert str(out / "report.html") in printed
    assert (out / "ranked-lists.png").stat().st_size > 1000
    assert not (out / "unfinished").exists()


def test_the_kernels_are_in_the_report(bench_run):
    out, printed = bench_run
    assert read_report(out / "report.json").environment["kernels"] == build_info()
    assert describe_build() in (out / "report.md").read_text()
    assert "kernels of the mix" not in printed


def test_exports_are_kept_for_the_next_run_and_a_damaged_one_is_made_anew(bench_run, exports, trained, people):
    out, _ = bench_run
    artifacts = sorted((out / "artifacts").glob("*.onnx"))
    assert [path.name.endswith("-int8-cpu.onnx") for path in artifacts] == [True, False]
    artifacts[1].write_bytes(b"damaged")
    exports.clear()
    args = ("--backends", "ort-cpu", "--precisions", "fp32,int8", "--batches", "1", "--max-rank1-flips", "off")
    args += ("--wrong-preprocessing", "off")
    with workers_here():
        done = run_here(SCRIPT, trained, *args, "--seconds", "0.2", "--out", out, PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    built = {result.name: result.build_s is not None for result in read_report(out / "report.json").results}
    assert built == {"torch fp32": False, "ort-cpu fp32": True, "ort-cpu int8": False}
    assert all(path.stat().st_size > 300_000 for path in artifacts)
    ((recipe, verification),) = exports
    assert recipe.precision == "fp32"
    assert (verification.verify_root, verification.verify_dataset) == (str(people), "synthetic")


def test_an_engine_is_built_where_it_cannot_run(exports, trained, tmp_path, people):
    moved = fewer(people, tmp_path / "moved")
    with workers_here():
        done = run_here(
            SCRIPT, trained, "--backends", "tensorrt-rtx", "--precisions", "fp32", "--root", moved,
            "--batches", "1", "--seconds", "0.2", "--out", tmp_path / "report", "--wrong-preprocessing", "off",
            PMM_FAST="1",
        )  # fmt: skip
    report = read_report(tmp_path / "report" / "report.json")
    result = report.results[1]
    assert (result.name, result.status) == ("tensorrt-rtx fp32", "unavailable")
    assert result.reason == "engine built, but there is no NVIDIA GPU here to run it on"
    assert result.artifact_bytes
    assert result.build_s
    assert report.dataset.root == str(moved)
    assert exports[-1][1].verify_root == str(moved)
    # asked for by name, so its absence is a failure
    assert done.returncode == 1
    assert [failure.gate for failure in report.gates.failures] == ["--backends"]


def test_environment_is_plain():
    facts = describe_environment(threads=2)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"]
    assert facts["cores"] >= 1


def test_an_interrupted_run_goes_on_where_it_was(trained, exported, people, tmp_path, monkeypatch):
    out, calls, really_time = tmp_path / "report", [], latency_run.time_batch
    command = (SCRIPT, trained, exported, "--batches", "1,2", "--seconds", "0.2", "--out", out)
    command += ("--root", fewer(people, tmp_path / "people"))

    def interrupted(workers, paths, *args, **options):
        if len(paths) == 2:
            raise KeyboardInterrupt
        return really_time(workers, paths, *args, **options)

    class Noted(WorkerHere):
        def call(self, method, /, **arguments):
            calls.append((self.name, method))
            return super().call(method, **arguments)

    with workers_here() as patch:
        patch.setattr(latency_run, "time_batch", interrupted)
        done = run_here(*command, PMM_FAST="1")
    assert done.returncode == 130
    assert "continue with --resume" in done.stderr
    first = json.loads((out / "unfinished" / "batch-1.json").read_text())

    with workers_here(Noted):
        done = run_here(*command, "--resume", PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    called = {method for name, method in calls if name != "builder"}
    assert "turn" in called
    assert not called & {"embed", "compare_batch_sizes"}
    report = read_report(out / "report.json")
    assert [[timing.batch for timing in result.batches] for result in report.results] == [[1, 2], [1, 2]]
    kept = report.results[1].batches[0].samples_ms
    assert list(kept) == first["timings"]["ort-cpu fp32 model.onnx"]["samples_ms"]
    assert report.results[1].min_cosine is not None


def test_crops_that_cannot_be_read_are_all_told_before_anything_is_measured(trained, people, tmp_path, capsys):
    root = shutil.copytree(people, tmp_path / "people")
    bad = [min((root / part).glob("[0-9]*.jpg")) for part in ("query", "bounding_box_test", "bounding_box_train")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:700])
    flags = {"dataset": "market1501", "root": str(root), "backends": "ort-cpu", "precisions": "fp32"}

    def split_of(*, gallery=False, **more):
        options = Options(**flags, out=tmp_path / "out", **more)
        request = make_request([trained], options, GateFlags().parsed(), ChainOptions(gallery=gallery))
        with Bench(request) as bench:
            return bench.accuracy.split, bench._unreadable

    with workers_here(pages=True):
        with refuses(InvalidFile, "2 images", *(path.name for path in bad[:2]), path=root, hint="--skip-bad-images"):
            split_of()
        with refuses(InvalidFile, "3 images", bad[2].name, path=root):  # distractors are made from training crops
            split_of(gallery=True)
        split, unreadable = split_of(skip_bad_images=True)
    assert unreadable == 2
    assert not {sample.path for sample in (*split.query, *split.gallery)} & set(bad)
    said = capsys.readouterr().err
    assert [f"left out {path}: " in said for path in bad] == [True, True, False]
