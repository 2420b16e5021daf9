"""What mistakes in preparing crops cost: on which crops, by which figures, and what becomes of one that fails."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.bench.accuracy import AccuracyEvaluator
from pmm.bench.preprocessing_cost import PreprocessingCosts, sampled
from pmm.bench.resume_store import ResumeStore
from pmm.bench.worker import WorkerSession
from pmm.data.crops import load_crops
from pmm.data.mistakes import likely_mistakes
from pmm.data.samples import DISTRACTOR, ReidDataset, Sample
from pmm.data.splits import matchable
from pmm.evaluation.metrics import evaluate_ranking
from pmm.evaluation.parity.retrieval import retrieval_parity
from pmm.evaluation.ranking import labels_of
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import UserError
from tests.bench.foreign import adopted_onnx
from tests.conftest import examples

MISTAKES = [{"name": name, "mistake": f"{name}, made", "reason": ""} for name in ("bgr", "resize")]


def crop(pid, camid):
    return Sample(Path(f"{pid}-{camid}.jpg"), pid, camid)


def crowd(identities=6, cameras=3, distractors=20):
    query = [crop(pid, 0) for pid in range(1, identities + 1)]
    gallery = [crop(pid, camera) for pid in range(1, identities + 1) for camera in range(1, cameras)]
    return ReidDataset(train=(), query=tuple(query), gallery=(*gallery, *[crop(DISTRACTOR, 1)] * distractors))


CROPS = st.lists(st.builds(crop, st.integers(1, 9), st.integers(0, 2)), min_size=8, max_size=40)


@examples(100)
@given(query=CROPS, gallery=CROPS, most=st.integers(1, 30))
def test_a_sample_has_every_crop_of_some_who_are_evaluated(query, gallery, most):
    places = sampled(ReidDataset(train=(), query=tuple(query), gallery=tuple(gallery)), most)
    pids = [sample.pid for sample in (*query, *gallery)]
    assert places == sorted(set(places))
    known = sorted({each.pid for each, counts in zip(query, matchable(query, gallery), strict=True) if counts})
    if len(pids) <= most or len(known) < 2:
        assert places == list(range(len(pids)))
        return
    chosen = {pids[place] for place in places}
    assert len(chosen) >= 2
    assert chosen <= set(known)
    assert {known[0], known[-1]} <= chosen
    assert len(places) == sum(Counter(pids)[pid] for pid in chosen)
    assert len(places) <= most or len(chosen) == 2


def measured(split, embed, folder, *, mistakes=MISTAKES, sample=False):
    """The costs, and the right embeddings."""
    rows = np.random.default_rng(0).standard_normal((len(split.query) + len(split.gallery), 8)).astype(np.float32)
    accuracy, done = AccuracyEvaluator(split), []
    right = accuracy.reference(accuracy.split_embeddings(rows))
    costs = PreprocessingCosts(split, sample=sample, resume_store=ResumeStore(folder, {}, resume=folder.exists()))
    found = costs.measure(mistakes, right, embed, lambda: done.append(1))
    assert len(done) == len(mistakes)
    return found, rows


def wrong(mistake, places):
    """Other embeddings for each mistake, which depend on the crop alone."""
    rows = np.random.default_rng(len(mistake)).standard_normal((100, 8)).astype(np.float32)
    return rows[places]


@pytest.mark.parametrize("sample", [False, True])
def test_the_figures_are_those_of_retrieval_parity_on_these_crops(tmp_path, monkeypatch, sample):
    monkeypatch.setattr("pmm.bench.preprocessing_cost.MOST_CROPS", 9)
    split = crowd()
    found, right = measured(split, wrong, tmp_path / "out", sample=sample)
    assert (found.sample, found.identities, found.queries, found.gallery) == (
        (True, 3, 3, 6) if sample else (False, 6, 6, 32)
    )
    places = sampled(split, 9) if sample else range(38)
    queries = [place for place in places if place < 6]
    gallery = [place for place in places if place >= 6]
    part = ReidDataset(
        train=(),
        query=tuple(split.query[place] for place in queries),
        gallery=tuple(split.gallery[place - 6] for place in gallery),
    )
    labels = labels_of(part)
    before = evaluate_ranking(right[queries], right[gallery], **vars(labels))
    assert (found.mAP, found.rank1) == (before.mAP, before.rank1)
    for cost, name in zip(found.costs, ("bgr", "resize"), strict=True):
        after = evaluate_ranking(wrong(name, queries), wrong(name, gallery), **vars(labels))
        parity = retrieval_parity(before, after, labels)
        assert (cost.mistake, cost.reason) == (f"{name}, made", "")
        assert (cost.mAP, cost.rank1) == (after.mAP, after.rank1)
        assert (cost.map_delta, cost.map_delta_interval) == (parity.map_delta.value, parity.map_delta.interval)
        assert (cost.rank1_delta, cost.rank1_delta_interval) == (parity.rank1_delta.value, parity.rank1_delta.interval)


def test_a_mistake_that_cannot_be_made_or_measured_says_why_and_the_next_is_measured(tmp_path):
    def embed(mistake, places):
        if mistake == "resize":
            raise UserError("the worker crashed")
        return np.full((len(places), 8), np.nan, np.float32) if mistake == "nan" else wrong(mistake, places)

    mistakes = [
        {"name": "unnormalised", "mistake": "a", "reason": "the file does it"},
        {"name": "resize", "mistake": "b", "reason": ""},
        {"name": "nan", "mistake": "c", "reason": ""},
        {"name": "bgr", "mistake": "d", "reason": ""},
    ]
    found, _ = measured(crowd(), embed, tmp_path / "out", mistakes=mistakes)
    said = [cost.reason for cost in found.costs]
    assert said[:2] == ["the file does it", "the worker crashed"]
    assert "NaN" in said[2]
    assert said[3] == ""
    assert [cost.mAP is None for cost in found.costs] == [True, True, True, False]


def test_what_an_interrupted_run_measured_is_not_measured_again(tmp_path):
    asked = []

    def embed(mistake, places):
        asked.append(mistake)
        if asked == ["bgr", "resize"]:
            raise KeyboardInterrupt
        return wrong(mistake, places)

    with pytest.raises(KeyboardInterrupt):
        measured(crowd(), embed, tmp_path / "out")
    resumed, _ = measured(crowd(), embed, tmp_path / "out")
    assert asked == ["bgr", "resize", "resize"]
    whole, _ = measured(crowd(), wrong, tmp_path / "other")
    assert resumed == whole


def test_the_reference_is_fed_what_the_mistake_would_feed(people, tmp_path):
    file = adopted_onnx("cnn", tmp_path / "adopted.onnx")
    paths, out = sorted((people / "query").iterdir())[:5], tmp_path / "rows.npy"
    (tmp_path / "crops.json").write_text(json.dumps([str(path) for path in paths]))
    session = WorkerSession(lambda done: None)
    session.open(str(file), backend="ort-cpu", precision="fp32", device="cpu", cuda_graph=None, threads=1)
    with OrtRunner(file, threads=1) as runner:
        size = runner.preprocessing
        right = runner(load_crops(paths, size))
        names = [mistake.name for mistake in likely_mistakes(size)]
        assert names == ["bgr", "resize", "unnormalised"]
        for mistake in likely_mistakes(size):
            session.embed(str(tmp_path / "crops.json"), str(out), mistake=mistake.name)
            made = np.load(out)
            assert np.array_equal(made, runner(mistake.fed(load_crops(paths, mistake.made))))
            assert not np.allclose(made, right, atol=1e-3)
    session.embed(str(tmp_path / "crops.json"), str(out))
    assert np.array_equal(np.load(out), right)
