"""Runs of the bench on networks that others made, adopted in torch and as ONNX files."""

import pytest

from pmm.bench.schema import read_report
from pmm.utils.files import sha256
from tests.bench.foreign import DIM, HEIGHT, WIDTH, adopted_checkpoint, adopted_onnx, foreign_network
from tests.bench.workers import fewer, workers_here
from tests.conftest import run_here, run_python

SCRIPT = "bench/run.py"


def judged(source, people, folder, *words, code=0, **env):
    """The report on `source`, and what was printed."""
    words += ("--dataset", "market1501", "--root", people, "--batches", "1", "--seconds", "0.2", "--out", folder)
    run = run_python if env else run_here
    with workers_here():
        done = run(SCRIPT, source, *words, PMM_FAST="1", **env)
    assert done.returncode == code, done.stderr + done.stdout
    return read_report(folder / "report.json"), done.stdout


def test_an_adopted_onnx_file_is_judged_by_its_own_run(people, tmp_path):
    source = adopted_onnx("attention", tmp_path / "adopted.onnx")
    root = fewer(people, tmp_path / "people")
    words = ("--backends", "torch,ort-cpu,openvino", "--precisions", "fp32")
    report, printed = judged(source, root, tmp_path / "report", *words, code=1)
    own, torch, other = report.results
    assert (own.name, torch.name, other.name) == ("ort-cpu fp32", "torch fp32", "openvino fp32")
    assert (own.status, torch.status, other.status) == ("ok", "unavailable", "ok")
    assert own.artifact == other.artifact == str(source)
    assert (own.build_s, own.notes, other.notes) == (None, (), ())
    assert (report.reference, own.map_delta, own.min_cosine) == (own.name, 0, 1)
    assert other.min_cosine > 0.99999
    assert other.batches[0].speedup is not None
    assert [(failure.gate, failure.result) for failure in report.gates.failures] == [("--backends", "torch fp32")]
    facts = report.checkpoint
    assert (facts.kind, facts.method, facts.epoch, facts.path) == ("onnx", "adopted", None, str(source))
    assert (facts.height, facts.width, facts.embedding_dim) == (HEIGHT, WIDTH, DIM)
    assert facts.source["SHA-256"] == sha256(tmp_path / "foreign.onnx")
    numbers = sum(p.numel() for p in foreign_network("attention").parameters())
    assert facts.parameters_m == pytest.approx(numbers / 1e6, rel=0.01)
    assert "OpenCV's bilinear" in facts.preprocessing
    assert [cost.reason for cost in report.wrong_preprocessing.costs] == ["", "", ""]
    crops = report.dataset.queries + report.dataset.gallery
    assert f"mAP of ort-cpu fp32 on {crops} crops" in printed
    assert "kernels of the mix" not in printed


@pytest.mark.slow
def test_a_file_that_normalises_itself_cannot_be_normalised_wrongly(people, tmp_path):
    source = adopted_onnx("cnn", tmp_path / "adopted.onnx", uint8=True)
    root = fewer(people, tmp_path / "people")
    report, _ = judged(source, root, tmp_path / "report", "--backends", "ort-cpu", "--precisions", "fp32")
    bgr, resize, unnormalised = report.wrong_preprocessing.costs
    assert None not in (bgr.mAP, resize.mAP)
    assert (unnormalised.mAP, unnormalised.map_delta) == (None, None)
    assert "normalises" in unnormalised.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pth", "onnx"])
@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_every_export_of_an_adopted_network_is_judged(name, kind, people, tmp_path):
    source = (adopted_onnx if kind == "onnx" else adopted_checkpoint)(name, tmp_path / f"adopted.{kind}")
    # rank-1 of a network that was not trained flips easily
    words = ("--backends", "ort-cpu,openvino,tensorrt-rtx", "--precisions", "fp32,int8", "--max-rank1-flips", "off")
    report, _ = judged(source, people, tmp_path / "report", *words, "--max-map-drop", "off", code=1)
    reference, *others = report.results
    assert reference.name == ("torch fp32" if kind == "pth" else "ort-cpu fp32")
    assert (report.checkpoint.method, report.checkpoint.epoch) == ("adopted", None)
    assert report.checkpoint.source
    for result in others:
        if result.backend == "tensorrt-rtx":
            assert (result.status, "built" in result.reason) == ("unavailable", True)
            continue
        assert (result.status, result.reason) == ("ok", "")
        if result.name != "openvino int8":  # it computes attention in its own way, which is for the gates to judge
            assert result.min_cosine > (0.99999 if result.precision == "fp32" else 0.98)
    failed = {failure.result for failure in report.gates.failures}
    assert {"tensorrt-rtx fp32", "tensorrt-rtx int8"} <= failed <= {r.name for r in others if r.backend[:3] != "ort"}


@pytest.mark.slow
def test_an_adopted_onnx_file_is_judged_without_torch(people, tmp_path):
    source = adopted_onnx("cnn", tmp_path / "adopted.onnx")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise ImportError('no torch here')")
    words = ("--precisions", "fp32,int8", "--backends", "ort-cpu", "--max-rank1-flips", "off", "--max-map-drop", "off")
    report, _ = judged(source, people, tmp_path / "report", *words, PYTHONPATH=str(tmp_path / "without"))
    assert [(result.name, result.status) for result in report.results] == [
        ("ort-cpu fp32", "ok"), ("ort-cpu int8", "ok")
    ]  # fmt: skip
