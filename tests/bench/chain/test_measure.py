"""The chain on made-up embeddings: links, losses that add up, lists that are cut, what fails, gates."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from pmm.bench.chain.gates import chain_failures
from pmm.bench.chain.measure import ChainTask, measure_chain
from pmm.bench.chain.stored import stored_as
from pmm.bench.chain_schema import ChainLoss
from pmm.bench.gates import GateFlags
from pmm.bench.latency import LatencyPlan
from pmm.evaluation.parity.labels import QueryGallery
from pmm.evaluation.parity.thresholds import verification
from tests.bench.chain.people import labelled

PLAN = LatencyPlan(warmup=0.0, warmup_runs=1, samples=10, settle=0.0, budget=0.1)
GATES = GateFlags().parsed()


def task_of(embedded, labels, scale=0.05, **facts):
    rng = np.random.default_rng(0)
    artifact = QueryGallery(*(each + np.float32(scale) * rng.normal(size=each.shape).astype("f4") for each in embedded))
    threshold = verification(artifact, labels).points[0].threshold
    fields = {"normalised": False, "threshold": threshold, "target_fmr": 1e-2, **facts}
    return ChainTask(
        reference="torch fp32", artifact="ort-cpu int8", of_reference=embedded, of_artifact=artifact, labels=labels,
        **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    task = task_of(*labelled(seed=1))
    return measure_chain(task, tmp_path_factory.mktemp("chain"), indexes=("certified", "certified-fp16"), plan=PLAN)


def test_links_follow_from_the_checkpoint_to_the_index(chain):
    stored = {f"stored {precision}": "ort-cpu int8" for precision in ("fp32", "fp16", "int8")}
    parents = {"torch fp32": None, "ort-cpu int8": "torch fp32", **stored}
    parents |= {"certified": "stored fp32", "certified-fp16": "stored fp16"}
    assert {link.name: link.parent for link in chain.links} == parents
    assert all(link.status == "ok" and not link.findings for link in chain.links)
    assert [link.name for link in chain.links if link.required] == ["stored fp32", "certified"]
    assert (chain.link("torch fp32").loss, chain.link("torch fp32").total) == (None, None)
    for name in ("certified", "certified-fp16"):
        link = chain.link(name)
        assert link.loss == dataclasses.replace(
            link.loss, map_delta=0.0, rank1_delta=0.0, rank1_lost=0, rank1_gained=0, top10_overlap=1.0,
            newly_accepted=0, newly_rejected=0,
        )  # fmt: skip
        assert link.alone_per_s == pytest.approx(1000 / link.alone_ms)
        assert link.resident_bytes < link.disk_bytes
    assert chain.link("ort-cpu int8").fmr == pytest.approx(0.01, rel=0.1)
    assert list(chain_failures(chain, GATES, queries=40)) == []


def add_up(chain):
    """Whether the losses along each path are the total, in all that is lost and gained."""
    for link in (each for each in chain.links if each.total is not None):
        steps = [each.loss for each in chain.path(link.name)[1:]]
        for field in ("map_delta", "rank1_delta", "minp_delta"):
            assert sum(getattr(each, field) for each in steps) == pytest.approx(getattr(link.total, field), abs=1e-9)
        for gain, fall in (("newly_accepted", "newly_rejected"), ("rank1_gained", "rank1_lost")):
            net = [getattr(each, gain) - getattr(each, fall) for each in (*steps, link.total)]
            assert sum(net[:-1]) == net[-1]


def test_losses_add_up(chain):
    add_up(chain)


def test_a_large_gallery_is_cut_into_lists_and_only_that_link_loses(tmp_path, monkeypatch):
    monkeypatch.setattr("pmm.bench.chain.measure.DEPTH", 12)
    monkeypatch.setattr("pmm.bench.chain.measure.WHOLE", 48)
    task = task_of(*labelled(seed=1))
    chain = measure_chain(task, tmp_path, indexes=("certified",), plan=PLAN)
    cut, certified = chain.link("first 12 of stored fp32"), chain.link("certified")
    assert certified.parent == cut.name
    assert cut.loss.map_delta < 0
    assert cut.loss.newly_rejected > 0
    assert (certified.loss.map_delta, certified.loss.newly_rejected) == (0, 0)
    assert certified.total.map_delta < -GATES.max_map_drop
    assert list(chain_failures(chain, GATES, queries=40)) == []  # that lists end is no fault of the index
    loose = dataclasses.replace(certified, fmr=1.6 * cut.fmr)  # and lets pass more than lists of that length can tell
    assert loose.fmr < GATES.max_fmr_factor * chain.link("ort-cpu int8").fmr
    chain = dataclasses.replace(chain, links=tuple(loose if each is certified else each for each in chain.links))
    assert [failure.gate for failure in chain_failures(chain, GATES, queries=40)] == ["--max-fmr-factor"]


def test_embeddings_at_norm_1_are_compared_by_cosine(tmp_path):
    embedded, labels = labelled(seed=1)
    unit = QueryGallery(*(each / np.linalg.norm(each, axis=1, keepdims=True) for each in embedded))
    task = task_of(unit, labels, scale=0.0, normalised=True)
    chain = measure_chain(task, tmp_path, indexes=("certified",), plan=PLAN)
    certified = chain.link("certified")
    assert not certified.findings
    assert (certified.loss.map_delta, certified.loss.newly_rejected, certified.loss.newly_accepted) == (0, 0, 0)
    assert certified.tpr > 0.1


def test_half_precision_by_cosine_is_one_ranking_in_the_gallery_and_in_what_it_is_held_against(tmp_path):
    """Stored rows are off norm 1, and crops as near as these would change places by that."""
    embedded, labels = labelled(seed=1)
    near = QueryGallery(*(1 + np.float32(1e-3) * (each - each.mean()) for each in embedded))
    unit = QueryGallery(*(each / np.linalg.norm(each, axis=1, keepdims=True) for each in near))
    task = task_of(unit, labels, scale=0.0, normalised=True)
    half = measure_chain(task, tmp_path, indexes=("certified-fp16",), plan=PLAN).link("certified-fp16")
    assert not half.findings
    assert half.loss.map_delta == half.loss.newly_accepted == half.loss.newly_rejected == 0
    assert half.loss.top10_overlap == 1


def test_storing_takes_no_more_memory_than_what_is_stored():
    rows = np.random.default_rng(0).normal(size=(60_000, 128)).astype(np.float32)
    for precision in ("fp16", "int8"):
        tracemalloc.start()
        stored_as(rows, precision)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.4 * rows.nbytes


def test_what_cannot_be_stored_or_built_is_a_link_with_its_reason(tmp_path, monkeypatch):
    embedded, labels = labelled(seed=1)
    large = QueryGallery(*(each * np.float32(2e4) for each in embedded))
    monkeypatch.setattr("pmm.utils.extras.find_spec", lambda name: None)
    task = task_of(large, labels)
    chain = measure_chain(task, tmp_path, indexes=("certified", "certified-fp16", "hnsw-16"), plan=PLAN)
    states = {link.name: link.status for link in chain.links if link.status != "ok"}
    assert states == {"stored fp16": "failed", "certified-fp16": "failed", "hnsw-16": "unavailable"}
    assert "65504" in chain.link("stored fp16").reason
    assert "faiss" in chain.link("hnsw-16").reason
    assert {failure.result for failure in chain_failures(chain, GATES, queries=40)} == {"stored fp16", "certified-fp16"}


def test_gates_fail_for_a_broken_threshold_that_map_hides(chain):
    """As a projection to few dimensions is: nearly the same ranking, all distances shorter."""
    index = chain.link("certified")
    loose = dataclasses.replace(index, fmr=1.6 * chain.link("ort-cpu int8").fmr)
    tight = dataclasses.replace(index, tpr=index.tpr - 0.03)
    assert isinstance(index.total, ChainLoss)
    for link, gate in ((loose, "--max-fmr-factor"), (tight, "--max-tpr-drop")):
        links = tuple(link if each is index else each for each in chain.links)
        (failure,) = chain_failures(dataclasses.replace(chain, links=links), GATES, queries=40)
        assert (failure.result, failure.gate) == ("certified", gate)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0), ("fp16", 5e-4), ("int8", 5e-3)])
def test_what_is_stored_comes_back_as_near_as_its_precision(precision, tolerance):
    rows = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    rows[3] = 0
    back = stored_as(rows, precision)
    assert back.dtype == np.float32
    assert np.abs(back - rows).max() <= tolerance * np.abs(rows).max()
    assert not back[3].any()
