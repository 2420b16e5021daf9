"""The bench on engines: built, judged and timed with TensorRT whole (tests/export/whole.py), in each version."""

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from pmm.artifacts.artifact import SELFTEST_SUFFIXES, manifest_path, read_manifest, selftest_paths
from pmm.artifacts.onnx_file import read_onnx
from pmm.bench import artifacts, candidates
from pmm.bench.artifacts import profiles_for
from pmm.bench.latency import LatencyPlan
from pmm.bench.latency_run import LatencyRun
from pmm.bench.run_results import RunResults
from pmm.bench.schema import read_report
from pmm.bench.worker import WorkerSession
from pmm.export import trt
from pmm.export.options import MIN_COSINE, EngineOptions, ExportOptions
from pmm.export.trt import engine_from_onnx
from pmm.utils.errors import BackendUnavailable
from pmm.utils.hardware import Gpu
from tests.bench.conftest import GPUS
from tests.bench.foreign import adopted_onnx
from tests.bench.workers import exported_before, fewer, workers_here
from tests.conftest import run_here
from tests.refusals import refuses
from tests.runtime.standin import LISTS

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")

VERSIONS = sorted(LISTS)
NEWEST, RTX = VERSIONS[-2:]
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
ONCE = set(zip([*VERSIONS, NEWEST], PRECISIONS, strict=True))
QUICK = ("fp32", "fp16", "int8")


def mark_of(version, precision):
    if (version, precision) not in ONCE:
        return pytest.mark.full
    return [] if precision in QUICK else pytest.mark.slow


@pytest.fixture(scope="module")
def few(people, tmp_path_factory):
    return fewer(people, tmp_path_factory.mktemp("few") / "people", ids=2)


@pytest.fixture
def bench(trained, shared, few, tmp_path):
    """Runs pmm bench in this process on exports that are there; returns the report."""

    def run(*words, precision="fp32", code=0):
        recipe = ExportOptions(precision="fp32" if precision == "tf32" else precision)
        words += ("--precisions", precision, "--root", few, "--device", "cpu", "--out", tmp_path / "report")
        words += ("--wrong-preprocessing", "off")
        with workers_here(), exported_before(shared, [recipe]):
            done = run_here("bench/run.py", trained, *words, "--seconds", "0.05", "--samples", "10", PMM_FAST="1")
        assert done.returncode == code, done.stderr + done.stdout
        return read_report(tmp_path / "report" / "report.json")

    return run


@pytest.mark.parametrize(
    ("version", "precision"),
    [
        # each version and each precision, some of them in test-slow; in test-full, each with each
        pytest.param(version, precision, marks=mark_of(version, precision))
        for version in VERSIONS
        for precision in PRECISIONS
    ],
)
def test_an_engine_is_built_judged_and_timed(machine, bench, version, precision):
    world, backend = machine(version)
    report = bench("--backends", backend, "--batches", "1,3", "--cuda-graph", "on", precision=precision)
    found = report.result(f"{backend} {precision} graph")
    assert (found.status, found.reason, found.notes, report.gates.failures) == ("ok", "", (), ())
    assert (found.device, found.gpu, found.precision) == ("cuda", GPUS[0].name, precision)
    number = version.split("-")[1]
    assert found.provider == f"{backend} {number} (buffers: host 1.0, CUDA graph)"
    assert MIN_COSINE[precision] <= found.min_cosine
    assert MIN_COSINE[precision] <= found.batch_min_cosine
    assert None not in (found.mAP, found.map_delta, found.build_s, found.tracker)
    for timing in found.batches:
        assert timing.device_ms == pytest.approx(1.0)  # the stand-in's GPU takes 1 ms a run
        assert timing.upload_ms == pytest.approx(timing.batch * 128 * 64 * 3 / 1000)
        assert timing.in_flight == 8
    # each in the profile that is made for it, whatever else ran
    assert [(timing.batch, timing.profile) for timing in found.batches] == [(1, 1), (3, 3)]
    assert {best for batch, best in world.ran if batch == 1} == {1}
    assert {best for batch, best in world.ran if batch != 1} == {3}
    assert max(world.ran)[0] == 64


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"lies": "fp32"}, "fp16.* the engine inspector .*fp32"),
        ({"dies": "GPU memory, 10.9"}, "memory"),
    ],
)
def test_an_engine_that_is_refused_or_not_built_costs_the_others_nothing(machine, bench, kind, reason):
    machine(NEWEST, **kind)
    report = bench("--backends", "tensorrt", "--batches", "1", "--cuda-graph", "on", precision="fp16", code=1)
    torch, engine = report.results
    assert (torch.status, len(torch.batches), engine.status) == ("ok", 1, "failed")
    assert re.search(reason, engine.reason)
    assert [failure.result for failure in report.gates.failures] == [engine.name]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_of_an_adopted_onnx_file_is_judged_by_the_files_own_run(machine, few, tmp_path, precision):
    machine(NEWEST)
    source = adopted_onnx("cnn", tmp_path / "adopted.onnx")
    words = ("--backends", "tensorrt", "--precisions", precision, "--batches", "1", "--cuda-graph", "on")
    words += ("--dataset", "market1501", "--root", few, "--seconds", "0.05", "--wrong-preprocessing", "off")
    with workers_here():
        run_here("bench/run.py", source, *words, "--samples", "10", "--out", tmp_path / "report", PMM_FAST="1")
    report = read_report(tmp_path / "report" / "report.json")
    own, engine = report.results
    assert (own.name, own.device, engine.device) == ("ort-cpu fp32", "cpu", "cuda")
    assert (engine.status, engine.reason) == ("ok", "")
    assert engine.min_cosine >= MIN_COSINE[precision]
    assert engine.batches[0].speedup is not None
    assert report.timing.matrix_tflops == {}, "there is no torch to measure it with"


@pytest.mark.parametrize("inspector", ["nothing", pytest.param("names", marks=pytest.mark.slow)])
def test_an_inspector_that_tells_nothing_leaves_an_engine_that_is_timed(machine, bench, inspector):
    machine(NEWEST, inspector=inspector)
    report = bench("--backends", "tensorrt", "--batches", "1", "--cuda-graph", "both", precision="fp16")
    assert [(result.status, result.precision) for result in report.results[1:]] == [("ok", "fp16")] * 2
    off, on = report.results[1:]
    assert (off.cuda_graph, on.cuda_graph) == (False, True)
    assert off.artifact == on.artifact
    assert "no CUDA graph" in off.provider


@pytest.mark.parametrize(
    ("batches", "profiles"),
    [
        ([1, 8], ((1, 1, 1), (1, 8, 64))),
        ([8, 1, 8], ((1, 1, 1), (1, 8, 64))),
        ([256], ((1, 256, 256),)),
        ([1, 32, 128], ((1, 1, 1), (1, 32, 32), (1, 128, 128))),
    ],
)
def test_each_batch_has_a_profile_and_none_is_too_large(batches, profiles):
    assert profiles_for(batches) == profiles
    found = EngineOptions(batch=profiles).profiles
    assert {batch: found.profiles[found.runs_as(batch)[0]].best for batch in batches} == {b: b for b in batches}
    assert all(found.runs_as(count)[1] == count for count in (*range(1, 41), 64))


@pytest.mark.slow
def test_an_engine_is_kept_for_the_same_batches_and_the_same_gpu(machine, trained, shared, few, tmp_path, monkeypatch):
    machine(NEWEST)
    figures = read_onnx(shared.onnx()).manifest.parity
    check = SimpleNamespace(check=lambda *args: figures)  # a whole one takes most of the time
    monkeypatch.setattr(trt, "engine_parity_check", lambda *args: check)

    def made(batches, device="cuda"):
        with exported_before(shared, [ExportOptions()]):
            return artifacts.make_artifact(
                kind="engine", precision="fp32", file_precision="fp32", device=device, flavor="tensorrt",
                batches=batches, source=str(trained), folder=str(tmp_path), dataset="synthetic", root=str(few),
            )  # fmt: skip

    first, again, other = made([1, 3]), made([1, 3]), made([1, 3, 64])
    assert (first["path"], first["build_s"] is None, again["build_s"]) == (again["path"], False, None)
    assert (other["path"] == first["path"], other["build_s"] is None) == (False, False)
    assert made([1, 3])["build_s"] is None
    path = Path(first["path"])
    renamed = first["path"].replace("-1_3-", "-3-")
    for end in ("", ".json", *SELFTEST_SUFFIXES):
        shutil.copyfile(first["path"] + end, renamed + end)
    other = made([3])
    assert (other["path"], other["build_s"] is None) == (renamed, False), "its name alone says that it is another"
    assert made([1, 3], device="cuda:1")["build_s"] is not None
    path.write_bytes(b"damaged")
    assert made([1, 3])["build_s"] is not None
    unverified = dataclasses.replace(read_manifest(path), parity=None)
    manifest_path(path).write_text(unverified.to_json())
    assert made([1, 3])["build_s"] is not None, "it was never compared, and a GPU here runs it"
    assert read_manifest(path).parity == figures
    selftest_paths(path)[0].unlink()
    assert made([1, 3])["build_s"] is not None, "its ONNX file has a selftest"
    assert made([1, 3])["build_s"] is None


def test_rtx_runs_with_kernels_that_are_final(machine, shared, tmp_path):
    world, _ = machine(RTX)
    engine_from_onnx(read_onnx(shared.onnx()), tmp_path / "m.plan", EngineOptions(flavor="rtx", batch=((1, 4, 8),)))
    world.configs.clear()
    for graph in (False, True):
        session = WorkerSession(lambda done: None)
        session.open(
            str(tmp_path / "m.plan"), backend="tensorrt-rtx", precision="fp32", device="cuda", cuda_graph=graph,
            threads=1,
        )  # fmt: skip
    strategies = {config.dynamic_shapes_kernel_specialization_strategy.name for config in world.configs}
    assert strategies == {"EAGER"}
    assert {config.cuda_graph_strategy is None for config in world.configs} == {True, False}


def test_a_gpu_by_its_number_is_the_one_that_is_built_for_and_opened(machine, shared, tmp_path, monkeypatch):
    machine(NEWEST)
    found = candidates.export_candidates(["tensorrt", "ort-cpu"], ["fp32"], device="cuda:1", cuda_graph="on")
    assert [(c.backend, c.device, c.device_name) for c in found] == [
        ("torch", "cuda", "cuda:1"), ("tensorrt", "cuda", "cuda:1"), ("ort-cpu", "cpu", "cpu")
    ]  # fmt: skip
    engine_from_onnx(read_onnx(shared.onnx()), tmp_path / "m.plan", EngineOptions(device="cuda:1", batch=((1, 4, 8),)))
    ((given, _),) = candidates.artifact_candidates([tmp_path / "m.plan"], device="cuda:1")
    session = WorkerSession(lambda done: None)
    opened = session.open(
        str(given.artifact), backend="tensorrt", precision="fp32", device=given.device_name, cuda_graph=True, threads=1
    )
    assert opened["device"] == GPUS[1].name
    with refuses(BackendUnavailable, "2", "0 NVIDIA Standin 6000, 1 NVIDIA Standin 4000", "CUDA_VISIBLE_DEVICES"):
        candidates.export_candidates(["tensorrt"], ["fp32"], device="cuda:2")
    rtx = candidates.Candidate(backend="tensorrt-rtx", precision="fp32", device="cuda", gpu=1)
    assert rtx.unavailable_reason() == ""
    monkeypatch.setattr(candidates, "nvidia_gpus", lambda: (GPUS[0], Gpu("Tesla T4", "7.5")))
    assert "does not run on compute capability 7.5" in rtx.unavailable_reason()


def test_the_rate_of_matrix_products_is_that_gpus(machine):
    machine(NEWEST)
    for device, asked in (("cuda:1", "cuda:1"), ("cuda", "cuda:0")):
        reference, *_ = candidates.export_candidates(["torch"], ["fp32"], device=device)
        options = SimpleNamespace(plan=LatencyPlan())
        request = SimpleNamespace(reference=reference, candidates=[reference], options=options)
        workers = {reference.name: SimpleNamespace(call=lambda method, **words: words)}
        run = LatencyRun(request, workers, Mock(), RunResults(workers, Mock(), print), Mock(), (), Mock())
        assert run.matrix_rate() == {"device": asked}
