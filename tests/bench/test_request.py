"""What a user asks for, and what is wrong with it: one line each, before anything is measured."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

from pmm.artifacts.artifact import manifest_path, new_artifact
from pmm.artifacts.checkpoint import load, save
from pmm.artifacts.onnx_file import read_onnx
from pmm.bench import candidates
from pmm.bench.artifacts import describe_source
from pmm.bench.candidate_evaluator import CandidateEvaluator
from pmm.bench.candidates import Candidate, export_candidates
from pmm.bench.gates import GateFlags
from pmm.bench.request import Options, default_out, make_request, resolve_inputs
from pmm.bench.workers import WorkerFailed
from pmm.export.options import ExportOptions
from pmm.runtime.open import BACKENDS
from pmm.utils.errors import ConflictingOptions, InvalidFile
from pmm.utils.files import claimed, sha256
from pmm.utils.hardware import Gpu
from tests.bench.foreign import adopted_checkpoint, adopted_onnx, as_export
from tests.bench.workers import WorkerHere, fewer, workers_here
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.data import trees
from tests.refusals import refuses
from tests.utils.test_task_runner import alive

SCRIPT = "bench/run.py"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(candidates, "nvidia_gpus", lambda: (Gpu("a GPU", "9.0"),))


def names(*args, **options):
    return [candidate.name for candidate in export_candidates(*args, **options)]


def test_the_reference_always_comes_first():
    assert names(["ort-cpu"], ["fp32"]) == ["torch fp32", "ort-cpu fp32"]
    assert names(["ort-cpu", "torch"], ["int8", "fp32"]) == ["torch fp32", "ort-cpu int8", "ort-cpu fp32"]


def test_all_and_auto_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(candidates, "nvidia_gpus", lambda: ())
    auto = names(["auto"], ["auto"])
    assert auto == ["torch fp32", "ort-cpu fp32", "ort-cpu int8", "openvino fp32", "openvino int8"]
    everything = export_candidates(["all"], ["all"])
    assert {candidate.backend for candidate in everything} == set(BACKENDS)
    assert {c.name for c in everything if c.device == "cpu"} >= {"torch-compile fp32", "aoti bf16", "openvino int8"}
    for candidate in everything:
        if candidate.backend == "ort-cuda":
            assert candidate.unavailable_reason() == "no NVIDIA GPU here"


def test_all_on_a_gpu(gpu):
    everything = names(["all"], ["all"])
    assert everything[0] == "torch fp32"
    assert {"torch tf32", "torch fp16 graph", "ort-cuda bf16", "tensorrt int8 graph", "ort-cpu int8"} <= set(everything)
    assert len(everything) == len(set(everything))
    only = export_candidates(["tensorrt"], ["fp16"], cuda_graph="on")
    assert [c.name for c in only] == ["torch fp32", "tensorrt fp16 graph"]
    assert {c.device for c in only} == {"cuda"}
    assert export_candidates(["torch"], ["fp32"], device="cpu")[0].device == "cpu"
    rtx = next(c for c in export_candidates(["tensorrt-rtx"], ["fp16"]) if c.backend == "tensorrt-rtx")
    assert rtx.unavailable_reason() == "TensorRT-RTX does not run on compute capability 9.0"


@pytest.mark.parametrize("with_gpu", [False, True])
def test_an_adopted_onnx_file_is_compared_with_its_own_run_on_the_cpu(monkeypatch, with_gpu):
    monkeypatch.setattr(candidates, "nvidia_gpus", lambda: (Gpu("a GPU", "8.9"),) * with_gpu)
    usual = names(["auto"], ["fp32"], source="onnx", cuda_graph="off", device="auto")
    rest = ["ort-cuda fp32", "tensorrt fp32"] if with_gpu else ["openvino fp32"]
    assert usual == ["ort-cpu fp32", *rest]
    everything = export_candidates(["all"], ["all"], source="onnx")
    assert (everything[0].name, everything[0].device) == ("ort-cpu fp32", "cpu")
    without = {c.backend for c in everything if "holds no network" in c.unavailable_reason()}
    assert without == {"torch", "torch-compile", "aoti"}
    assert not any("holds no network" in c.unavailable_reason() for c in export_candidates(["all"], ["all"]))


@pytest.fixture(scope="module")
def adopted(tmp_path_factory):
    """An adopted ONNX file, and an export of it in the same folder."""
    folder = tmp_path_factory.mktemp("adopted")
    source = adopted_onnx("cnn", folder / "adopted.onnx")
    return source, as_export(source, folder / "export.onnx")


def test_an_adopted_onnx_file_is_judged_alone_with_its_exports_or_found_from_one(adopted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, export = adopted
    for files in ([source, export], [export]):
        found, all_candidates, required = resolve_inputs(files, Options())
        assert (found, required) == (source, {"ort-cpu"})
        assert [c.name for c in all_candidates] == ["ort-cpu fp32", "ort-cpu fp32 export.onnx"]
        assert [c.artifact for c in all_candidates] == [None, export]
    request = make_request([source], Options(backends="ort-cpu,openvino", precisions="int8"), GateFlags().parsed())
    assert (request.source, request.out, request.reference.name) == (source, source.parent / "report", "ort-cpu fp32")
    assert [c.name for c in request.candidates] == ["ort-cpu fp32", "ort-cpu int8", "openvino int8"]
    for name in (export.name, manifest_path(export).name):
        shutil.copy(export.with_name(name), tmp_path / name)
    with refuses(InvalidFile, "adopted ONNX file", "runs/", path=tmp_path / export.name, hint="pmm bench ADOPTED"):
        resolve_inputs([tmp_path / export.name], Options())


def test_exports_are_judged_beside_what_they_come_from_alone(adopted, exported, trained, tmp_path):
    source, export = adopted
    with refuses(ConflictingOptions, "2 models", options=(str(trained), str(source)), expected="one checkpoint or"):
        resolve_inputs([trained, source], Options())
    other = adopted_onnx("attention", tmp_path / "other.onnx")
    with refuses(InvalidFile, "another adopted ONNX file", sha256(source)[:12], path=export, expected=str(other)):
        resolve_inputs([other, export], Options())
    with refuses(InvalidFile, "another checkpoint", sha256(trained)[:12], path=exported, expected=str(source)):
        resolve_inputs([source, exported], Options())


def test_an_adopted_file_without_a_run_in_fp32_is_no_reference(adopted, tmp_path):
    file = read_onnx(adopted[0])
    manifest = dataclasses.replace(file.manifest, precision="int8", precision_found="int8", parity=None)
    del file.proto.metadata_props[:]
    with new_artifact(tmp_path / "int8.onnx", manifest) as draft:
        draft.path.write_bytes(file.proto.SerializeToString())
    with refuses(InvalidFile, "int8", path=tmp_path / "int8.onnx", expected="fp32", hint="adopt"):
        resolve_inputs([tmp_path / "int8.onnx"], Options())


@pytest.mark.parametrize("kind", ["onnx", pytest.param("pth", marks=pytest.mark.slow)])
def test_without_a_data_set_one_line_says_what_to_give(kind, people, tmp_path):
    source = (adopted_onnx if kind == "onnx" else adopted_checkpoint)("cnn", tmp_path / f"adopted.{kind}")
    for words in ((), ("--root", people), ("--dataset", "market1501")):
        with workers_here():
            done = run_here(SCRIPT, source, *words)
        assert_one_line_error(done, str(source), "which data set", "--dataset NAME and --root DIR")
    assert not (tmp_path / "report" / "report.json").exists()


def test_what_is_asked_for_without_a_partner_is_refused():
    with refuses(ConflictingOptions, "ort-cpu", "tf32", expected="torch on cuda, torch-compile on cuda"):
        export_candidates(["ort-cpu"], ["tf32", "fp32"], device="cpu")
    with refuses(ConflictingOptions, "ort-cpu", "fp16", expected="--precisions fp32 or int8"):
        export_candidates(["ort-cpu", "openvino"], ["fp16"])


def test_an_artifact_alone_finds_its_checkpoint(trained, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses(InvalidFile, "checkpoint", "runs/", path=exported, hint=f"pmm bench CKPT {exported}"):
        resolve_inputs([exported], Options())
    (tmp_path / "runs" / "a").mkdir(parents=True)
    copy = tmp_path / "runs" / "a" / "best.pth"
    shutil.copyfile(trained, copy)
    checkpoint, found, asked = resolve_inputs([exported], Options())
    assert checkpoint.resolve() == copy.resolve()
    assert [c.name for c in found] == ["torch fp32", "ort-cpu fp32 model.onnx"]
    assert asked == {"ort-cpu"}


def test_given_artifacts_take_the_place_of_exports(trained, exported):
    _, found, asked = resolve_inputs([trained, exported], Options(backends="ort-cpu,openvino", precisions="fp32,int8"))
    assert [c.name for c in found] == [
        "torch fp32", "ort-cpu fp32 model.onnx", "openvino fp32 model.onnx", "ort-cpu int8", "openvino int8",
    ]  # fmt: skip
    assert asked == {"ort-cpu", "openvino"}
    assert resolve_inputs([trained], Options(backends="tensorrt,all", precisions="all"))[2] == {"tensorrt"}


@pytest.mark.parametrize(
    ("precision", "with_gpu", "said"),
    [("fp16", False, "ort-cpu does not compute in fp16 on cpu"), ("fp32", False, ""), ("int8", True, "")],
)
def test_what_onnx_runtime_would_compute_in_fp32_is_not_measured_as_something_else(
    shared, tmp_path, monkeypatch, precision, with_gpu, said
):
    if with_gpu:  # an int8 file's products are fp32 there: it runs on the CPU
        monkeypatch.setattr(candidates, "nvidia_gpus", lambda: (Gpu("a GPU", "9.0"),))
    file = shared.onnx(ExportOptions(precision=precision))
    ((candidate, _),) = candidates.artifact_candidates([file])
    assert (candidate.backend, candidate.precision, candidate.device) == ("ort-cpu", precision, "cpu")
    assert candidate.unavailable_reason() == said
    worker = WorkerHere("w", tmp_path / "w.log", threads=1, timeout=1.0)
    asked = {"backend": "ort-cpu", "precision": precision, "device": "cpu", "cuda_graph": None, "threads": 1}
    if said:  # nor if it were asked to
        with refuses(WorkerFailed, "onnxruntime", "runs in fp32", "expected fp16"):
            worker.call("open", artifact=str(file), **asked)
    else:
        assert worker.call("open", artifact=str(file), **asked)["device"] == "cpu"


def test_two_artifacts_of_one_name_are_refused(trained, exported, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copyfile(exported, tmp_path / name / "model.onnx")
        shutil.copyfile(manifest_path(exported), tmp_path / name / "model.onnx.json")
    options = tuple(str(tmp_path / name / "model.onnx") for name in "ab")
    with refuses(ConflictingOptions, "'ort-cpu fp32 model.onnx'", options=options, hint="rename"):
        resolve_inputs([trained, tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"], Options())


def test_bad_input_is_one_line(trained, exported, tmp_path, people):
    def refused(*args, expected):
        done = run_here(SCRIPT, *args)
        assert_one_line_error(done, *expected)

    refused(trained, "--backends", "gpu", expected=["--backends", "'gpu'", "torch, torch-compile, aoti, ort-cpu"])
    refused(trained, "--precisions", "fp8", expected=["--precisions", "'fp8'", "fp32, tf32"])
    refused(trained, "--batches", "0,1", expected=["--batches", "'0,1'"])
    refused(trained, "--batches", "", expected=["--batches", "''"])
    refused(trained, "--batches", "8,5000", expected=["--batches", "'8,5000'", "4096"])
    refused(trained, "--max-map-drop", "7", expected=["--max-map-drop", "'7'", "from 0 to 1", "off"])
    refused(trained, "--seconds", "0", expected=["--seconds is 0", "3600"])
    refused(trained, "--samples", "0", expected=["--samples is 0", "1 or more"])
    refused(trained, "--timeout", "0", expected=["--timeout is 0", "86400"])
    refused(trained, "--device", "tpu", expected=["device", "'tpu'", "cuda:N"])
    refused(
        trained, "--wrong-preprocessing", "some", expected=["--wrong-preprocessing", "'some'", "sample, all or off"]
    )
    refused(trained, "--cuda-graph", "maybe", expected=["--cuda-graph", "'maybe'", "on, off or both"])
    refused(trained, tmp_path / "none.onnx", expected=["none.onnx", "does not exist"])
    shutil.copyfile(trained, tmp_path / "second.pth")
    refused(trained, tmp_path / "second.pth", expected=["2 models", str(trained), "second.pth", "expected one"])
    (tmp_path / "model.engine").write_bytes(b"x")
    refused(trained, tmp_path / "model.engine", expected=["model.engine: ", "manifest", "model.engine.json"])
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(
        trained,
        tmp_path / "weights.bin",
        expected=["weights.bin: ", "content", "expected a checkpoint"],
    )
    (tmp_path / "bad.onnx").write_bytes(b"x")
    refused(trained, tmp_path / "bad.onnx", expected=["bad.onnx: ", "truncated", "ONNX"])


def test_a_foreign_onnx_file_is_one_line(trained, tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value],
                                   [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])])  # fmt: skip
    onnx.save(onnx.helper.make_model(graph), tmp_path / "theirs.onnx")
    done = run_here(SCRIPT, trained, tmp_path / "theirs.onnx")
    assert_one_line_error(done, "theirs.onnx: an ONNX file without a manifest")


def test_artifacts_of_different_checkpoints_are_one_line(trained, exported, tmp_path):
    state = load(trained)
    save(tmp_path / "other.pth", {**state, "epoch": state["epoch"] + 1})
    done = run_here(SCRIPT, tmp_path / "other.pth", exported)
    assert_one_line_error(done, "model.onnx: ", "another checkpoint", sha256(trained)[:12], "other.pth")


def test_a_changed_artifact_is_one_line(trained, exported, tmp_path):
    shutil.copyfile(manifest_path(exported), tmp_path / "model.onnx.json")
    (tmp_path / "model.onnx").write_bytes(exported.read_bytes() + b"\0")
    assert_one_line_error(run_here(SCRIPT, trained, tmp_path / "model.onnx"), "model.onnx")


def test_data_without_matches_is_one_line(trained, people, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(people, alone)
    queries = {path.name.split("_")[0] for path in (alone / "query").iterdir()}
    for path in (alone / "bounding_box_test").iterdir():
        if path.name.split("_")[0] in queries:
            path.unlink()
    with workers_here():
        done = run_here(SCRIPT, trained, "--root", alone, "--out", tmp_path / "report")
    assert_one_line_error(done, str(alone), "cannot be ranked", "another camera", "pmm check")
    with workers_here():
        done = run_here(SCRIPT, trained, "--root", tmp_path, "--out", tmp_path / "report")
    assert_one_line_error(done, "layout of synthetic")
    with workers_here():
        done = run_here(SCRIPT, trained, "--dataset", "market1501", "--out", tmp_path / "report")
    assert_one_line_error(done, "--dataset market1501", "--root")


def test_a_report_of_files_that_are_given_has_a_folder_of_its_own(trained, exported):
    alone, beside = (
        make_request(files, Options(), GateFlags().parsed()).out for files in ([trained], [trained, exported])
    )
    assert (alone, beside) == (trained.parent / "report", trained.parent / "report-model")


def test_the_folder_of_many_files_has_a_name_of_bounded_length(trained):
    def folder(*names):
        files = [Path(f"{name}.onnx") for name in names]
        artifacts = [Candidate(backend="ort-cpu", precision="fp32", device="cpu", artifact=file) for file in files]
        return default_out(trained, artifacts).name

    assert folder("a", "b", "c") == "report-a-b-c"
    assert folder(*(f"model-{index}" for index in range(9))) == "report-model-0-and-8-more"
    assert len(folder("x" * 250, "b")) < 100


def test_a_checkpoint_that_is_none_is_one_line(tmp_path):
    (tmp_path / "x.pth").write_text("")
    with workers_here():
        done = run_here(SCRIPT, tmp_path / "x.pth", "--out", tmp_path / "report")
    assert_one_line_error(done, "x.pth: ", "truncated", "checkpoint")


def test_an_output_folder_of_another_schema_or_in_use_is_one_line(trained, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text(json.dumps({"schema": "pmm-bench-1"}))
    done = run_here(SCRIPT, trained, "--out", old)
    assert_one_line_error(done, str(old), "'pmm-bench-1'", "--out")
    used = tmp_path / "used"
    with claimed(used):
        assert_one_line_error(run_here(SCRIPT, trained, "--out", used), str(used), "another process")
    with workers_here():
        done = run_here(SCRIPT, trained, "--out", tmp_path / "new", "--resume")
    assert_one_line_error(done, str(tmp_path / "new"), "no interrupted run", "--resume")


def test_ctrl_c_keeps_what_is_finished(trained, exported, people, tmp_path):
    """In processes: the workers, without torch, are asked for turns that never end."""
    out, scripted = tmp_path / "report", tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "checkpoint.json").write_text(json.dumps(describe_source(trained)))
    words = ("--batches", "1", "--root", fewer(people, tmp_path / "people"), "--out", out, "--samples")
    driver = (
        "import runpy, sys; from pmm.bench import harness, workers\n"
        f"workers.COMMAND = (sys.executable, {str(ROOT / 'tests' / 'bench' / 'scripted_worker.py')!r})\n"
        "harness.usable_cores = lambda: 1\n"
        f"sys.argv = sys.argv[1:]; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, SCRIPT, *map(str, (trained, exported, *words)), "1000000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PMM_SCRIPTED": str(scripted), "PYTHONPATH": str(ROOT)},
        # a test run in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    kept = out / "unfinished" / "ort-cpu_fp32_model.onnx.json"
    try:
        deadline = time.monotonic() + 120
        while not (scripted / "turn").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "continue with --resume" in said
    assert not (out / "report.json").exists()
    workers = [int(path.name) for path in scripted.iterdir() if path.name.isdigit()]
    assert len(workers) == 3, "the builder, the reference and the file"
    assert not any(map(alive, workers))
    before = kept.stat().st_mtime_ns
    with workers_here():
        done = run_here(SCRIPT, trained, exported, *words, "10", "--resume")
    assert_one_line_error(done, str(out), "plan was", "'samples': 1000000", "'samples': 10,", "--resume")
    assert kept.stat().st_mtime_ns == before


def test_help_lists_everything():
    done = run_here(SCRIPT, "--help")
    assert done.returncode == 0
    for backend in BACKENDS:
        assert backend in done.stdout
    for flag in ("--max-map-drop", "--min-cosine", "--resume", "--batches"):
        assert flag in done.stdout
    assert Path("bench/run.py").name in done.stdout


def test_crops_of_another_layout_are_verified_on_and_judged(trained, tmp_path):
    names = [f"{part}/{who}/{n}.jpg" for part in ("train", "query", "gallery") for who in "abcdef" for n in "123"]
    root = trees.folders(tmp_path / "mine", names)
    of = ("--dataset", "folder", "--root", root, "--backends", "ort-cpu", "--precisions", "fp32", "--batches", "1")
    of += ("--wrong-preprocessing", "off")
    with workers_here():
        done = run_here(SCRIPT, trained, *of, "--seconds", "0.2", "--out", tmp_path / "report", PMM_FAST="1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [result["status"] for result in report["results"]] == ["ok", "ok"]
    assert report["dataset"]["name"] == "folder"


def test_a_checkpoint_that_changes_meanwhile_is_not_judged(trained, people, tmp_path, monkeypatch):
    copy = tmp_path / "last.pth"
    shutil.copy(trained, copy)
    made = CandidateEvaluator.evaluate

    def evaluate(self, candidate):
        result = made(self, candidate)
        state = load(copy)
        save(copy, state | {"epoch": state["epoch"] + 1})
        return result

    monkeypatch.setattr(CandidateEvaluator, "evaluate", evaluate)
    root = fewer(people, tmp_path / "people")
    words = (SCRIPT, copy, "--root", root, "--backends", "torch", "--out", tmp_path / "report")
    with workers_here():
        done = run_here(*words, PMM_FAST="1")
    assert_one_line_error(done, str(copy), "changed during the bench", "a copy")
    assert not (tmp_path / "report/report.json").exists()


def test_what_is_no_checkpoint_is_passed_over_on_the_way_to_one(exported, trained, tmp_path):
    artifact = tmp_path / "model.onnx"
    for source in (exported, manifest_path(exported)):
        shutil.copy(source, tmp_path / source.name)
    (tmp_path / "a.pth").symlink_to("nowhere")
    (tmp_path / "b.pth").mkdir()
    shutil.copy(trained, tmp_path / "c.pth")
    checkpoint, *_ = resolve_inputs([artifact], Options())
    assert checkpoint == tmp_path / "c.pth"
