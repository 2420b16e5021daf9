"""Results of a run that goes on: what an error of one backend does, and what an interrupted run keeps."""

from unittest.mock import Mock

import pytest

from pmm.bench.resume_store import ResumeStore
from pmm.bench.run_results import RunResults
from pmm.utils.errors import UserError
from tests.bench.pages.sample_reports import ran


@pytest.fixture
def store(tmp_path):
    return ResumeStore(tmp_path, {}, resume=False)


def test_an_error_fails_one_backend_and_ends_its_worker(store):
    workers, lines = Mock(), []
    results = RunResults(workers, store, lines.append)
    for name in ("torch fp32", "ort-cpu fp32"):
        results.add(ran(name))
    results.guarded("ort-cpu fp32", Mock(side_effect=UserError("out of memory")))
    assert (results["ort-cpu fp32"].status, results["ort-cpu fp32"].reason) == ("failed", "out of memory")
    assert results.running == ["torch fp32"]
    workers.end.assert_called_once_with("ort-cpu fp32")
    assert lines == ["ort-cpu fp32: failed: out of memory"]


def test_what_could_not_be_timed_is_tried_again_by_a_run_that_is_resumed(store):
    results = RunResults(Mock(), store, print)
    results.add(ran("ort-cpu fp32"))
    results.add_untimed("ort-cpu fp32", "batch 64", UserError("out of memory"))
    results.add_untimed("ort-cpu fp32", "the tracker load", "no forty crops")
    assert results["ort-cpu fp32"].untimed == (
        "batch 64 could not be timed: out of memory",
        "the tracker load could not be timed: no forty crops",
    )
    results.store("ort-cpu fp32")
    kept = store.result("ort-cpu fp32")
    assert (kept.untimed, kept.batches, kept.mAP) == ((), (), results["ort-cpu fp32"].mAP)
