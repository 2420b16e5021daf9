import json
import shutil

import pytest

from pmm.checkpoint import load
from pmm.config import Config
from pmm.environment import describe_environment
from pmm.kernels import build_info, describe_build
from pmm.models.registry import build_model
from tests.conftest import assert_one_line_error, run_here, run_python


@pytest.fixture(scope="module")
def bench_run(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "report"
    done = run_python(
        "bench/run.py", trained, "--backends", "ort-cpu,tensorrt", "--batches", "1,3", "--out", out, PMM_FAST="1"
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_report_json_has_what_others_rely_on(bench_run, trained):
    out, _ = bench_run
    report = json.loads((out / "report.json").read_text())
    torch, ort, tensorrt = report["results"]
    for result in (torch, ort):
        assert result["status"] == "ok"
        assert (result["device"], result["precision"]) == ("cpu", "fp32")
        assert 0 < result["mAP"] <= 1
        assert 0 <= result["rank1"] <= 1
        assert abs(result["map_delta"]) < 1e-3
        assert result["min_cosine"] > 0.9999
        assert [b["batch"] for b in result["batches"]] == [1, 3]
        for batch in result["batches"]:
            assert batch["p50_ms"] > 0
            assert batch["images_per_s"] > 0
            assert batch["p90_ms"] is None  # a short run has too few samples for it
            assert len(batch["samples_ms"]) == 10
    assert (torch["backend"], ort["backend"], tensorrt["backend"]) == ("torch", "ort-cpu", "tensorrt")
    assert torch["map_delta"] == 0
    assert torch["min_cosine"] == 1
    assert tensorrt["status"] == "unavailable"
    assert tensorrt["reason"]
    assert tensorrt["mAP"] is None
    assert report["checkpoint"]["path"] == str(trained)
    assert report["dataset"]["queries"] == 72
    assert report["checkpoint"]["embedding_dim"] == 384
    config = Config.from_dict(load(trained)["config"])
    trained_numbers = sum(p.numel() for p in build_model(config).parameters())
    assert report["checkpoint"]["parameters_m"] == pytest.approx(trained_numbers / 1e6, abs=1e-9)


def test_mean_average_precision_is_the_evaluations(bench_run, trained, people, tmp_path):
    out, _ = bench_run
    done = run_here(
        "-m", "pmm.evaluate", trained, "--dataset", "market1501", "--root", people, "--json", tmp_path / "e.json"
    )
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "e.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert report["results"][0]["mAP"] == pytest.approx(evaluation["mAP"], abs=1e-6)
    assert report["results"][0]["rank1"] == pytest.approx(evaluation["rank1"], abs=1e-6)
    assert set(evaluation) == {"mAP", "rank1", "rank5", "rank10", "rank20", "mINP", "skipped_queries"}
    assert f"mAP {evaluation['mAP']:.1%}" in done.stdout


def test_pages_are_written_and_the_table_printed(bench_run):
    out, printed = bench_run
    assert "data:image/png;base64," in (out / "report.html").read_text()
    assert "ort-cpu" in (out / "report.md").read_text()
    assert "| ort-cpu" in printed
    assert str(out / "report.html") in printed


def test_the_kernels_are_in_report_and_output(bench_run):
    out, printed = bench_run
    assert json.loads((out / "report.json").read_text())["environment"]["kernels"] == build_info()
    assert f"kernels of the mix (training only): {describe_build()}" in printed


def test_exports_are_kept_for_the_next_run(bench_run, trained):
    out, _ = bench_run
    (onnx_file,) = (out / "artifacts").glob("*.onnx")
    before = onnx_file.stat().st_mtime_ns
    done = run_here("bench/run.py", trained, "--backends", "ort-cpu", "--batches", "1", "--out", out, PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    assert onnx_file.stat().st_mtime_ns == before
    onnx_file.write_bytes(b"damaged")
    done = run_here("bench/run.py", trained, "--backends", "ort-cpu", "--batches", "1", "--out", out, PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    assert onnx_file.stat().st_size > 1_000_000


def test_bad_input_is_one_line(trained, tmp_path):
    def refused(*args, expected, cwd=None):
        done = run_here(*args, cwd=cwd)
        assert_one_line_error(done, *expected)

    script = "bench/run.py"
    refused(script, trained, "--batches", "0,1", expected=["--batches is '0,1'"])
    refused(script, trained, "--batches", "", expected=["--batches"])
    refused(
        script, trained, "--backends", "gpu", "--out", tmp_path / "r", expected=["unknown backend gpu; known: torch"]
    )
    refused(script, trained, "--root", tmp_path, "--out", tmp_path / "r", expected=["not the layout of synthetic"])
    refused(script, tmp_path / "none.pth", expected=["none.pth does not exist"])
    (tmp_path / "x.pth").write_text("")
    refused(script, tmp_path / "x.pth", expected=["x.pth: truncated, or not a checkpoint"])


def test_one_backend_that_breaks_costs_the_others_nothing(trained, tmp_path, people, monkeypatch):
    from pmm.bench import harness

    def breaks(job, result):
        raise TypeError("factory function returned nullptr\nand more")

    monkeypatch.setitem(harness.BACKENDS, "tensorrt", breaks)
    moved = tmp_path / "moved"
    shutil.copytree(people, moved)
    done = run_here(
        "bench/run.py", trained, "--backends", "tensorrt,ort-cpu", "--root", moved, "--batches", "1",
        "--out", tmp_path / "report", PMM_FAST="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [r["status"] for r in report["results"]] == ["ok", "failed", "ok"]
    assert report["results"][1]["reason"] == "TypeError: factory function returned nullptr"
    assert report["results"][1]["mAP"] is None
    assert report["dataset"]["root"] == str(moved)


def test_environment_is_plain():
    facts = describe_environment(threads=2)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"]
    assert facts["cores"] >= 1
