"""The checks of `make gpu`: on a CPU where that means something, and on the stand-in of TensorRT."""

import ctypes
import json

import numpy as np
import pytest
import torch

from bench.lab import gpu_check, gpu_training
from bench.lab.gpu_engine import crops_and_truth, engine_figures
from bench.lab.gpu_epochs import epoch_figures
from bench.lab.gpu_figures import figures, format_value
from bench.lab.gpu_training import busy_time
from pmm.artifacts.onnx_file import read_onnx
from pmm.export.options import EngineOptions
from pmm.export.trt import engine_from_onnx
from pmm.runtime.trt import TrtRunner
from pmm.utils.errors import UserError
from pmm.utils.hardware import usable_cores
from tests.bench.pages.sample_reports import gpu_machine
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.refusals import refuses
from tests.runtime.standin import OnGpu

SCRIPT = ("-m", "bench.lab.gpu_check")


def checked(tmp_path, *words, **env):
    """What a check finds on this machine's CPU."""
    done = run_here(*SCRIPT, *words, "--device", "cpu", "--out", tmp_path / "found.json", PMM_FAST="1", **env)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "found.json").read_text())
    assert values["schema"] == "pmm-gpu-check-1"
    assert [name for name, _ in figures(values)] == list(values["found"])
    return values["found"]


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_steps_are_counted_and_timed(tmp_path, amp, monkeypatch):
    monkeypatch.setattr("pmm.training.precision.cpu_has_bf16", lambda: True)  # on another it is emulated
    found = checked(tmp_path, "throughput", "--steps", "2", "--amp", amp)
    assert (found["batch"], found["steps"]) == (8, 2)
    assert found["images/s"] == pytest.approx(8000 / found["ms per step"])
    assert found["loss"] > 0


@pytest.mark.parametrize(
    ("spans", "found"),
    [
        ([(0, 4)], (4, 4)),
        ([(6, 10), (0, 4)], (8, 10)),
        ([(0, 6), (2, 4), (5, 8)], (8, 8)),  # streams that overlap count once
        ([(0, 2), (2, 3), (9, 10)], (4, 10)),
    ],
)
def test_the_busy_share_counts_what_overlaps_once(spans, found):
    assert busy_time(spans) == found


def epoch(images_per_s, data_seconds=0.1, **more):
    return {"images_per_s": images_per_s, "data_seconds": data_seconds, "seconds": 2.0, **more}


def test_a_gpu_that_waits_in_a_run_is_an_error():
    records = [epoch(1.0, 2.0), epoch(10.0), *(epoch(rate, val_mAP=0.5) for rate in (100.0, 300.0, 200.0))]
    found = epoch_figures(records, [0.85, 0.97], 8, saves=2)
    assert found == {"workers": 8, "epochs": 5, "images/s": 200.0, "waiting for images": pytest.approx(0.05),
                     "evaluations": 3, "saves": 2, "GPU busy": pytest.approx(0.91)}  # fmt: skip
    with refuses(UserError, "89%", "200.0", expected="90%"):
        epoch_figures(records, [0.85, 0.93], 8, saves=2)
    assert "GPU busy" not in epoch_figures(records, [], 8, saves=0)
    for unseen, saves in ((records, 0), ([epoch(100.0)] * 5, 2)):  # the share would say nothing of what costs time
        with refuses(UserError, "not evaluated and saved"):
            epoch_figures(unseen, [0.97], 8, saves=saves)


@pytest.mark.slow
def test_a_whole_run_is_timed(tmp_path):
    found = checked(tmp_path, "epochs")
    assert (found["epochs"], found["workers"]) == (3, usable_cores())
    assert found["images/s"] > 0
    assert found["evaluations"] == 1


def test_one_process_by_a_group_trains_as_one_without(tmp_path):
    assert checked(tmp_path, "distributed") == {"backend": "gloo", "same bits": True, "all-reduce": True}
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_run_is_interrupted_and_goes_on_to_the_bit(tmp_path):
    found = checked(tmp_path, "resume")
    assert 0 < found["epochs before"] < found["epochs"]
    assert (found["same bits"], found["largest difference"]) == (True, 0.0)


def test_a_difference_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training, "check_resume", lambda *args: {"same bits": False, "largest difference": 1e-3})
    done = run_here(*SCRIPT, "resume", "--device", "cpu", "--out", tmp_path / "found.json", PMM_FAST="1")
    assert_one_line_error(done, "resume", "to the bit", "0.001")
    assert not (tmp_path / "found.json").exists()


def test_what_the_files_say_of_cuda_is_what_the_libraries_say(monkeypatch):
    monkeypatch.setattr(gpu_check, "side_by_side", lambda: {"driver": "13.0", "torch": "13.0", "tensorrt": "12"})
    for told, wrong in (("13.1", False), ("12.9", True)):
        monkeypatch.setattr(gpu_check, "_reported_cuda", lambda told=told: {"torch": told, "unknown": "11"})
        if wrong:
            with refuses(UserError, "torch", "13.0", "12.9"):
                gpu_check.cuda_majors()
        else:
            found = gpu_check.cuda_majors()
            assert found["tensorrt"] == "12"
            assert found["told by the library"]["torch"] == "13.1"


def test_files_are_given_to_the_check_that_takes_them(tmp_path):
    for words in (("engine", "a.plan"), ("libraries", "a.plan")):
        assert_one_line_error(run_here(*SCRIPT, *words, "--out", tmp_path / "x.json"), "ENGINE and CHECKPOINT")


def host(array):
    return np.frombuffer(ctypes.string_at(array.pointer, array.nbytes), np.float32).reshape(array.shape)


def opened(machine, trained, shared, tmp_path, version):
    """The stand-in's world, an engine's runner, crops and torch's embeddings."""
    world, _ = machine(version)
    flavor = "rtx" if "rtx" in version else "tensorrt"
    options = EngineOptions(batch=((1, 8, 64),), flavor=flavor)
    artifact = engine_from_onnx(read_onnx(shared.onnx()), tmp_path / "m.plan", options)
    return world, TrtRunner(artifact.path, warn=False), *crops_and_truth(trained)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116"])
def test_an_engine_shows_what_services_need(machine, trained, shared, tmp_path, version):
    world, runner, crops, expected = opened(machine, trained, shared, tmp_path, version)
    with runner:
        found = engine_figures(
            runner,
            crops,
            expected,
            to_gpu=lambda images: OnGpu(world, images, "interface"),
            from_gpu=host,
            seconds=0.01,
        )
    assert found["precision"] == "fp32"
    assert found["read from"] == "parsed network and engine inspector"
    assert found["layers"] > 1
    assert found["worst cosine"] > 0.99999
    assert found["same bits from GPU"] is True
    assert (found["random sizes"]["least"], found["random sizes"]["most"]) == (1, 40)
    assert all(found[key] > 0 for key in found if key.startswith("images/s"))


def test_an_engine_that_computes_something_else_fails(machine, trained, shared, tmp_path):
    world, runner, crops, expected = opened(machine, trained, shared, tmp_path, "tensorrt-11.4.0.106")
    words = {"to_gpu": lambda images: OnGpu(world, images, "interface"), "seconds": 0.01}
    with runner:
        with refuses(UserError, "cosine", expected=">= 0.99999"):
            engine_figures(runner, crops, expected[::-1], from_gpu=host, **words)
        with refuses(UserError, "1 images on the GPU", "host memory"):
            engine_figures(runner, crops, expected, from_gpu=lambda array: host(array) + 1e-6, **words)


def test_the_bench_has_a_line_per_result_and_per_failed_gate():
    report = gpu_machine()
    found = figures(json.loads(report.to_json()))
    assert [name for name, _ in found[: len(report.results)]] == [result.name for result in report.results]
    assert [name for name, _ in found[len(report.results) :]] == [f"gate {each.gate}" for each in report.gates.failures]
    told = dict(found)
    assert told["tensorrt-rtx fp16"] == "unavailable: TensorRT-RTX does not run on compute capability 9.0"
    fp16 = report.result("tensorrt fp16 graph")
    for part in (
        f"p50 ms {fp16.batches[0].p50_ms:.3g} @1, {fp16.batches[1].p50_ms:.3g} @8",
        "1 to 40 crops at random: mean 1.85",
        "11,081 images/s (in order of size 11,245)", f"mAP {100 * fp16.map_delta:+.2f} points",
    ):  # fmt: skip
        assert part in told["tensorrt fp16 graph"]
    assert "cosine" not in told["torch fp32"]


def test_every_report_of_a_step_has_figures():
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        values = json.loads(path.read_text())
        known = str(values["schema"]).rpartition("-")[0] in ("pmm-ops-bench", "pmm-loading-bench", "pmm-ablation")
        assert bool(figures(values)) == known or "bench-" in path.name, path.name


def test_a_training_step_has_its_times_and_their_ratios():
    ways = {"no mixing": 10.0, "ours": 10.2, "authors": 40.8}
    rows = [{"name": name, "step": {"p50_ms": ms}} for name, ms in ways.items()]
    ratios = [{"of": "authors", "over": "ours", "ratio": 4.0}, {"of": "ours", "over": "no mixing", "ratio": 1.02}]
    report = {"schema": "pmm-ops-bench-1", "step": {"batch": 128, "amp": "bf16"}, "rows": rows, "ratios": ratios}
    told = "p50 ms: no mixing 10, ours 10.2, authors 40.8; authors / ours 4, ours / no mixing 1.02"
    assert figures(report) == [("step of 128, amp bf16", told)]


def test_figures_are_short():
    told = [
        format_value(value) for value in (True, None, 1234.5, 0.999987, 0.0123456, 7, {"a": 1.0, "b": [1, "x"]}, [])
    ]
    assert told == ["yes", "-", "1,234", "0.999987", "0.0123", "7", "a 1, b 1; x", "nothing"]
