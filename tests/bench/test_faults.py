"""What the bench is for: a fault in a backend is caught by the gates that are on by default, and named: of our own
networks and of adopted ones."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pmm.artifacts.artifact import manifest_path
from pmm.bench import candidates, runner_factory, workers
from pmm.bench.request import Options
from pmm.bench.result_schema import Timing
from pmm.bench.schema import BenchReport, read_report
from pmm.bench.timing import time_batch
from pmm.bench.workers import WorkerProcess
from pmm.export.onnx import export_onnx
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.utils.hardware import Gpu
from tests.bench import faulty_worker
from tests.bench.faulty_worker import SLEEP_S
from tests.bench.foreign import NETWORKS, adopted_checkpoint, adopted_onnx, as_export
from tests.bench.test_latency import Clock
from tests.bench.workers import WorkerHere, fewer, workers_here
from tests.conftest import ROOT, run_here
from tests.store import Shared

FAULTY = (sys.executable, str(ROOT / "tests" / "bench" / "faulty_worker.py"))
DEADLY = ("hangs", "crashes", "crashes-when-timed")
HARMLESS = (
    "whole", "wrong-row", "swapped-channels", "other-resize", "off-by-one-crop", "fp16-overflow", "wrong-when-timed",
    "twice-as-long", "longer-if-few", "sleeps",
)  # fmt: skip
FROM_FLOATS = ("doubled-normalisation", "whole-floats")
WAYS = ["here", pytest.param("processes", marks=pytest.mark.full)]
"""Where the workers are; those of `DEADLY` are processes in any case."""
SOURCES = [
    *WAYS,
    *(pytest.param(f"{name}.{kind}", marks=pytest.mark.slow) for name in NETWORKS for kind in ("pth", "onnx")),
]
"""Our own network in each of these ways; and adopted ones, as networks in torch and as ONNX files."""


class Found(NamedTuple):
    """What a run of the bench left."""

    report: BenchReport
    code: int
    said: str


class FaultyProcess(WorkerProcess):
    """A worker that hangs is ended after a second, though it may load for longer."""

    def call(self, method: str, /, **arguments: Any) -> Any:
        if method == "embed" and self.name.endswith("hangs.onnx"):
            self.timeout = 1.0
        return super().call(method, **arguments)


def named(source: Path, folder: Path, *names: str) -> list[Path]:
    """Copies of an artifact and its manifest; the worker takes its fault from the name."""
    copies = []
    for name in names:
        copy = folder / f"{name}{source.suffix}"
        shutil.copyfile(source, copy)
        shutil.copyfile(manifest_path(source), manifest_path(copy))
        copies.append(copy)
    return copies


def bench(out: Path, *args: str | Path, way: str = "here", **env: str) -> Found:
    def start(name: str, log: Path, **given: Any) -> Any:
        here = way == "here" and not name.endswith(tuple(f"{fault}.onnx" for fault in DEADLY))
        return (WorkerHere if here else FaultyProcess)(name, log, **given)

    with workers_here(start) as patch:
        patch.setattr(workers, "COMMAND", FAULTY)
        patch.setattr(runner_factory, "open_candidate", faulty_worker.open_faulty)
        done = run_here("bench/run.py", *args, "--out", out, **env)
    assert "Traceback" not in done.stderr, done.stderr
    return Found(read_report(out / "report.json"), done.returncode, done.stdout + done.stderr)


def exported_foreign(source: Path, people: Path) -> tuple[Path, Path]:
    """Two fp32 exports of an adopted network: the usual one, and one that takes floats."""
    if source.suffix == ".onnx":
        export = as_export(source, source.with_name("export.onnx"))
        return export, export  # it takes floats already
    crops = VerifyOptions(verify_dataset="market1501", verify_root=str(people))
    usual, floats = (
        export_onnx(source, source.with_name(f"{kind}.onnx"), ExportOptions(input=kind), crops).path
        for kind in ("uint8", "float")
    )
    return usual, floats


@pytest.fixture(scope="module", params=SOURCES)
def accuracy(request: pytest.FixtureRequest, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One run over all faults that change embeddings or kill the worker, and artifacts that are whole."""
    folder, name = tmp_path_factory.mktemp("faults"), request.param
    if name in ("here", "processes"):
        shared: Shared = request.getfixturevalue("shared")
        source, usual, floats = shared.run(), shared.onnx(), shared.onnx(ExportOptions(input="float"))
    else:
        adopt = adopted_onnx if name.endswith(".onnx") else adopted_checkpoint
        source = adopt(Path(name).stem, folder / name)
        usual, floats = exported_foreign(source, people)
    files = [*named(usual, folder, *HARMLESS, *DEADLY), *named(floats, folder, *FROM_FLOATS)]
    words = ("--batches", "2", "--seconds", "0.2", "--timeout", "60", "--wrong-preprocessing", "off")
    words += ("--dataset", "market1501", "--root", str(fewer(people, folder / "people")))
    way = "processes" if name == "processes" else "here"
    return bench(folder / "report", source, *files, *words, way=way, PMM_FAST="1")


@pytest.fixture(scope="module", params=WAYS)
def latency(
    request: pytest.FixtureRequest, trained: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> Found:
    """One run over backends of known speed, long enough to judge them."""
    folder = tmp_path_factory.mktemp("speeds")
    files = named(exported, folder, "sleeps", "drifts", "noisy")
    words = ("--batches", "1", "--seconds", "4", "--wrong-preprocessing", "off")
    return bench(folder / "report", trained, *files, *words, way=request.param)


@pytest.fixture
def timed(exported: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Timing]:
    """As `latency` by a clock that only sleeping moves: turns, samples and statistics are the bench's own."""
    clock = Clock()
    monkeypatch.setattr(WorkerHere, "clock", clock)
    monkeypatch.setattr(faulty_worker, "now", clock)
    monkeypatch.setattr(faulty_worker, "sleep", lambda seconds: clock.step("", seconds)())
    monkeypatch.setattr(runner_factory, "open_candidate", faulty_worker.open_faulty)
    workers = {}
    for file in named(exported, tmp_path, "sleeps", "drifts", "noisy"):
        worker = WorkerHere(file.stem, tmp_path / f"{file.stem}.log", threads=1, timeout=60.0)
        ort = {"backend": "ort-cpu", "precision": "fp32", "device": "cpu", "cuda_graph": None, "threads": 1}
        worker.call("open", artifact=str(file), **ort)
        workers[file.stem] = (worker, "cpu")
    found = time_batch(
        workers,
        sorted((people / "query").iterdir())[:1],
        Options(seconds=8.0).plan,
        reference="sleeps",
        extras_s=0.1,
        advance=lambda name, share: None,
        clock=clock,
    )
    assert not found.refused | found.crashed
    return found.timings


def failures_of(found: Found, name: str) -> dict[str, str]:
    return {failure.gate: failure.message for failure in found.report.gates.failures if failure.result.endswith(name)}


@pytest.mark.parametrize(
    "fault",
    ["wrong-row", "wrong-when-timed", "swapped-channels", "other-resize", "off-by-one-crop", "doubled-normalisation"],
)
def test_a_moved_embedding_is_caught(accuracy: Found, fault: str) -> None:
    caught = failures_of(accuracy, f"{fault}.onnx")
    assert "--min-cosine" in caught
    assert "cosine" in caught["--min-cosine"]
    assert accuracy.code == 1
    assert f"{fault}.onnx" in accuracy.said


def test_the_crop_that_moved_is_named(accuracy: Found) -> None:
    result = next(r for r in accuracy.report.results if r.name.endswith("wrong-row.onnx"))
    samples = [r for r in accuracy.report.results if r.name == "ort-cpu fp32 whole.onnx"]
    assert samples[0].status == "ok"
    assert result.worst_crop
    assert Path(result.worst_crop).name in failures_of(accuracy, "wrong-row.onnx")["--min-cosine"]
    assert result.median_cosine is not None
    assert result.median_cosine > 0.9999  # one row in 64 only


def test_what_the_others_are_compared_with_is_named(accuracy: Found, request: pytest.FixtureRequest) -> None:
    of_onnx = ".onnx" in request.node.callspec.params["accuracy"]
    reference = "ort-cpu fp32" if of_onnx else "torch fp32"
    assert accuracy.report.reference == accuracy.report.results[0].name == reference
    assert accuracy.report.results[0].status == "ok"
    assert all(result.backend == "ort-cpu" for result in accuracy.report.results[1:])
    assert ("torch" in accuracy.said.replace("kernels of the mix", "")) != of_onnx


def test_embeddings_of_another_norm_are_caught(accuracy: Found) -> None:
    """They rank as before, and every threshold is wrong."""
    for name in ("twice-as-long.onnx", "longer-if-few.onnx"):
        caught = failures_of(accuracy, name)
        assert set(caught) == {"--max-norm-error"}
        assert all(fact in caught["--max-norm-error"] for fact in ("norm", "100.00%", "0.01%", "fp32"))


def test_an_overflow_is_caught(accuracy: Found) -> None:
    assert "NaN, Inf" in failures_of(accuracy, "fp16-overflow.onnx")["--backends"]


def test_whole_artifacts_pass(accuracy: Found) -> None:
    for name in ("whole.onnx", "whole-floats.onnx"):
        assert not failures_of(accuracy, f" {name}")
        (result,) = (r for r in accuracy.report.results if r.name.endswith(f" {name}"))
        assert result.status == "ok"
        assert len(result.batches) == 1


def test_a_backend_that_hangs_is_ended_and_the_others_go_on(accuracy: Found) -> None:
    said = failures_of(accuracy, "hangs.onnx")["--backends"]
    assert [fact for fact in ("no response", "'embed'", "1 s", "--timeout") if fact not in said] == []


def test_a_native_crash_is_reported_and_the_others_go_on(accuracy: Found) -> None:
    said = failures_of(accuracy, "crashes.onnx")["--backends"]
    assert [fact for fact in ("SIGSEGV", "about to crash", "crashes.onnx.log") if fact not in said] == []


def test_a_crash_while_timed_costs_the_others_nothing(accuracy: Found) -> None:
    said = failures_of(accuracy, "crashes-when-timed.onnx")["--backends"]
    assert "while batch 2 was timed" in said
    assert "SIGSEGV" in said
    timed = [r.name for r in accuracy.report.results if r.batches]
    assert accuracy.report.reference in timed
    assert "ort-cpu fp32 whole.onnx" in timed


def test_a_silent_fallback_to_the_cpu_is_caught(
    trained: Path, exported: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "nvidia_gpus", lambda: (Gpu("a GPU", "9.0"),))
    (file,) = named(exported, tmp_path, "falls-back")
    words = ("--batches", "1", "--seconds", "0.2", "--device", "cpu", "--root", fewer(people, tmp_path / "people"))
    words += ("--wrong-preprocessing", "off")
    found = bench(tmp_path / "report", trained, file, *words, PMM_FAST="1")
    result = next(r for r in found.report.results if r.backend == "ort-cuda")
    assert result.status == "failed"
    assert "fell back to CPUExecutionProvider" in result.reason
    assert found.code == 1


def test_a_known_sleep_is_measured_right(timed: dict[str, Timing]) -> None:
    timing = timed["sleeps"]
    assert timing.p50_ms == pytest.approx(1000 * SLEEP_S)
    assert timing.images_per_s == pytest.approx(1 / SLEEP_S)
    assert len(timing.samples_ms) == 400
    assert timing.flags == ()


def test_a_real_sleep_is_measured_no_shorter(accuracy: Found) -> None:
    (timing,) = next(r for r in accuracy.report.results if r.name.endswith("sleeps.onnx")).batches
    assert timing.p50_ms >= 1000 * SLEEP_S
    assert timing.p50_ms < 1000 * SLEEP_S * 4  # ten samples, on a machine that does other things
    assert 1000 * SLEEP_S <= 2000 / timing.images_per_s < 1000 * SLEEP_S * 4


@pytest.mark.parametrize(("fault", "flag"), [("drifts", "drifts: "), ("noisy", "noisy: ")])
def test_a_backend_that_cannot_be_trusted_is_flagged(timed: dict[str, Timing], fault: str, flag: str) -> None:
    assert any(line.startswith(flag) for line in timed[fault].flags), timed[fault].flags


@pytest.mark.slow
def test_real_sleeps_are_measured_right_and_flagged_if_they_change(latency: Found) -> None:
    timings = {Path(r.name.split()[-1]).stem: r.batches[0] for r in latency.report.results}
    timing = timings["sleeps"]
    assert timing.p50_ms >= 1000 * SLEEP_S
    assert timing.p50_ms < 1000 * SLEEP_S * 1.5
    assert 1000 * SLEEP_S <= 1000 / timing.images_per_s < 1000 * SLEEP_S * 1.5
    assert len(timing.samples_ms) >= 100
    for fault, flag in {"drifts": "drifts: ", "noisy": "noisy: "}.items():
        assert any(line.startswith(flag) for line in timings[fault].flags), timings[fault].flags
