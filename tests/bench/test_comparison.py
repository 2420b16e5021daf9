"""bench/compare.py: a gate for continuous integration that knows noise from change."""

import dataclasses
import json
import os

import numpy as np
import pytest

from pmm.bench.comparison import compare
from pmm.bench.result_schema import Estimate, Result, Timing
from pmm.bench.schema import SCHEMA, BenchReport, CheckpointFacts, DatasetFacts, Gates, TimingFacts, read_report
from pmm.utils.errors import ConflictingOptions
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

MACHINE = {"cpu": "a CPU", "threads": 2, "gpus": []}


def timing(ms=10.0, batch=1, seed=0, turns=20, flags=(), speedup=None):
    samples = np.random.default_rng(seed).normal(ms, 0.02 * ms, 10 * turns)
    return Timing(
        batch=batch, samples_ms=tuple(samples.tolist()), block=10, turns_s=tuple(map(float, range(turns))),
        warmup_s=1.0, steady=True, p50_ms=float(np.median(samples)), p50_interval_ms=None, p90_ms=None,
        p90_interval_ms=None, p95_ms=None, p95_interval_ms=None, p99_ms=None, p99_interval_ms=None,
        speedup=speedup, images_per_s=1.0, in_flight=1, device_ms=None, upload_ms=None, download_ms=None,
        end_to_end_ms=None, decode_ms=None, flags=flags,
    )  # fmt: skip


def result(name="ort-cpu fp32", ap=None, batches=(), **fields):
    scores = np.random.default_rng(1).uniform(0.4, 0.9, 200) if ap is None else ap
    found = Result(
        name=name, backend=name.split()[0], device="cpu", precision=name.split()[1], cuda_graph=None, status="ok",
        reason="", mAP=float(np.mean(scores)), per_query_ap=(None, *np.round(scores, 6).tolist()), batches=batches,
    )  # fmt: skip
    return dataclasses.replace(found, **fields)


def report(*results, machine=MACHINE, digest="d" * 64):
    return BenchReport(
        schema=SCHEMA, created="2026-01-02T03:04:05+00:00", seconds=1.0,
        checkpoint=CheckpointFacts(path="c.pth", sha256="a" * 64, method="pmm", epoch=1, embedding_dim=2,
                                   parameters_m=1.0, height=4, width=2),
        dataset=DatasetFacts(name="synthetic", root="r", queries=201, gallery=9, distractors=0, identities=2,
                             cameras=2, digest=digest),
        environment=dict(machine),
        timing=TimingFacts(samples=1, seconds=1.0, block=10, threads=2, matrix_tflops={}, gflop_per_image=None),
        reference="torch fp32", results=results,
        gates=Gates(max_map_drop=None, max_rank1_flips=None, min_cosine={}, max_p95_ms=None, max_norm_error={}),
    )  # fmt: skip


def changes(old, new, max_slowdown=0.05, max_map_drop=0.001):
    found = compare(old, new, max_slowdown=max_slowdown, max_map_drop=max_map_drop)
    return {(change.result, change.figure): change for change in found}


def kinds(old, new, **bounds):
    return {key: change.kind for key, change in changes(old, new, **bounds).items()}


def test_the_same_again_is_the_same():
    old = report(result(batches=(timing(seed=1), timing(80.0, batch=8, seed=2))))
    new = report(result(batches=(timing(seed=3), timing(80.0, batch=8, seed=4))))
    assert set(kinds(old, new).values()) == {"same"}
    assert set(kinds(old, new)) == {("ort-cpu fp32", f) for f in ("mAP", "p50 at batch 1", "p50 at batch 8")}


@pytest.mark.parametrize(
    ("factor", "allowed", "kind"),
    [(1.2, 0.05, "worse"), (1.2, 0.3, "same"), (0.8, 0.05, "better"), (1.03, 0.05, "same")],
)
def test_a_change_of_latency_beyond_noise_and_allowance(factor, allowed, kind):
    old, new = (report(result(batches=(timing(10 * times, seed=s),))) for s, times in ((1, 1.0), (2, factor)))
    found = changes(old, new, max_slowdown=allowed)["ort-cpu fp32", "p50 at batch 1"]
    assert found.kind == kind
    assert f"({factor:.2f}x" in found.summary or kind == "same"


def test_figures_that_cannot_be_trusted_are_not_judged():
    old, flagged = report(result(batches=(timing(),))), report(result(batches=(timing(20.0, flags=("noisy: x",)),)))
    found = changes(old, flagged)["ort-cpu fp32", "p50 at batch 1"]
    assert (found.kind, "noisy: x" in found.summary) == ("unknown", True)
    few = report(result(batches=(timing(20.0, turns=5),)))
    assert kinds(old, few)["ort-cpu fp32", "p50 at batch 1"] == "unknown"


def test_a_batch_that_is_no_longer_measured_is_worse():
    found = kinds(report(result(batches=(timing(),))), report(result()))
    assert found["ort-cpu fp32", "p50 at batch 1"] == "worse"


def test_accuracy_is_paired_over_queries():
    rng = np.random.default_rng(0)
    before = rng.uniform(0.1, 0.9, 200)
    small = before - 0.01 + rng.normal(0, 0.002, 200)  # far less than what queries differ by, but all of them
    noise = before + rng.normal(0, 0.1, 200)
    noise += before.mean() - noise.mean() - 0.002
    old = report(result(ap=before))
    assert kinds(old, report(result(ap=small)))["ort-cpu fp32", "mAP"] == "worse"
    assert kinds(old, report(result(ap=noise)))["ort-cpu fp32", "mAP"] == "same"
    assert kinds(report(result(ap=small)), old)["ort-cpu fp32", "mAP"] == "better"
    assert kinds(old, report(result(ap=small)), max_map_drop=0.02)["ort-cpu fp32", "mAP"] == "same"
    assert "-1.0" in changes(old, report(result(ap=small)))["ort-cpu fp32", "mAP"].summary


@pytest.mark.parametrize("status", ["failed", "unavailable"])
def test_a_backend_that_ran_and_does_no_longer_is_worse(status):
    gone = result(status=status, reason="no GPU here")
    assert changes(report(result()), report(gone, result("torch fp32")))["ort-cpu fp32", "status"].kind == "worse"
    both = report(result(), result("torch fp32"))
    assert kinds(both, report(result("torch fp32")))["ort-cpu fp32", "status"] == "worse"
    assert kinds(report(gone), report(result()))["ort-cpu fp32", "status"] == "better"


def test_on_other_hardware_only_speed_ups_are_compared():
    def measured(ms, speedup, machine):
        share = Estimate(value=speedup, interval=(speedup * 0.97, speedup * 1.03))
        reference = result("torch fp32", batches=(timing(100.0),))
        return report(reference, result(batches=(timing(ms, speedup=share),)), machine=machine)

    old = measured(10.0, 2.0, MACHINE)
    found = kinds(old, measured(30.0, 2.02, {**MACHINE, "cpu": "slower"}))
    assert ("torch fp32", "p50 at batch 1") not in found
    assert found["ort-cpu fp32", "speedup at batch 1"] == "same"
    found = changes(old, measured(30.0, 1.5, {**MACHINE, "threads": 1}))["ort-cpu fp32", "speedup at batch 1"]
    assert (found.kind, found.summary) == ("worse", "2.00x -> 1.50x over the reference, on different hardware")
    assert kinds(old, measured(5.0, 3.0, {**MACHINE, "gpus": ["x"]}))["ort-cpu fp32", "speedup at batch 1"] == "better"
    other = dataclasses.replace(measured(5.0, 3.0, {**MACHINE, "threads": 1}), reference="openvino fp32")
    assert kinds(old, other)["ort-cpu fp32", "speedup at batch 1"] == "unknown", "over another reference"


@pytest.mark.parametrize(("speedup", "kind"), [(1.88, "same"), (1.7, "worse"), (2.12, "same"), (2.3, "better")])
def test_a_speed_up_has_changed_only_beyond_both_intervals(speedup, kind):
    """3 % each: 1.88x may have been 1.94x, and 2.00x the same."""

    def measured(value, machine):
        share = Estimate(value=value, interval=(value * 0.97, value * 1.03))
        return report(result(batches=(timing(speedup=share),)), machine=machine)

    found = kinds(measured(2.0, MACHINE), measured(speedup, {**MACHINE, "cpu": "another"}))
    assert found["ort-cpu fp32", "speedup at batch 1"] == kind


def test_what_cannot_be_compared_is_refused():
    with refuses(ConflictingOptions, "crops", "201 queries", options=("OLD", "NEW")):
        changes(report(result()), report(result(), digest="e" * 64))
    with refuses(ConflictingOptions, "ort-cpu fp32", "torch fp32", "in common", options=("OLD", "NEW")):
        changes(report(result()), report(result("torch fp32")))


def test_the_command_exits_by_what_it_found(tmp_path):
    old, same, slow = tmp_path / "old.json", tmp_path / "same.json", tmp_path / "slow.json"
    old.write_text(report(result(batches=(timing(seed=1),))).to_json())
    same.write_text(report(result(batches=(timing(seed=2),))).to_json())
    slow.write_text(report(result(batches=(timing(15.0),))).to_json())
    assert read_report(old).results[0].per_query_ap[0] is None
    done = run_here("bench/compare.py", old, same)
    assert (done.returncode, "none of 2 figures are worse" in done.stdout) == (0, True)
    done = run_here("bench/compare.py", old, slow)
    assert done.returncode == 1
    assert "WORSE   ort-cpu fp32, p50 at batch 1" in done.stdout
    assert "1 of 2 figures is worse" in done.stdout
    assert run_here("bench/compare.py", old, slow, "--max-slowdown", "0.9").returncode == 0
    old.write_text(report(result("evil\x1b[2K\nnone", batches=(timing(seed=1),))).to_json())
    assert "same    evil\\x1b[2K\\nnone, p50 at batch 1" in run_here("bench/compare.py", old, old).stdout


def test_bad_input_is_one_line(tmp_path):
    def refused(*args, expected):
        assert_one_line_error(run_here("bench/compare.py", *args), *expected)

    good, bad, older = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "older.json"
    good.write_text(report(result()).to_json())
    older.write_text(json.dumps({"schema": "pmm-bench-2"}))
    refused(good, tmp_path / "none.json", expected=["none.json", "does not exist"])
    refused(good, older, expected=["older.json", "'pmm-bench-2'", "'pmm-bench-3'", "run pmm bench again"])
    for text in ("", "[]", "{}", json.dumps({**json.loads(good.read_text()), "seconds": "long"})):
        bad.write_text(text)
        refused(good, bad, expected=["bad.json: ", "not a report of pmm bench"])
    refused(good, good, "--max-slowdown", "-1", expected=["--max-slowdown is -1"])
    dead = report(*(dataclasses.replace(r, status="unavailable", reason="gone") for r in (result(),)))
    ap = result().per_query_ap
    for edited, text in (
        (dead, ["no backend", "both reports"]),
        (report(result(per_query_ap=ap[:-1])), ["ort-cpu fp32", "report NEW", "per_query_ap"]),
        (report(result(per_query_ap=(None,) * len(ap))), ["ort-cpu fp32", "report NEW", "per_query_ap"]),
        (report(result(mAP=None)), ["ort-cpu fp32", "report NEW", "mAP"]),
    ):
        bad.write_text(edited.to_json())
        refused(bad if edited is dead else good, bad, expected=text)
    os.mkfifo(tmp_path / "pipe")
    refused(good, tmp_path / "pipe", expected=["pipe", "device", "a report.json"])


def test_a_backend_that_failed_before_and_now_is_not_passed_over():
    failed = result(status="failed", reason="it crashed")
    both = report(failed, result("torch fp32"))
    change = changes(both, both)["ort-cpu fp32", "status"]
    assert (change.kind, change.summary) == ("unknown", "was failed, now failed (it crashed)")
