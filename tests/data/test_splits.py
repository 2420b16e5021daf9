from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pmm.data.samples import UNKNOWN_CAMERA, Sample
from pmm.data.splits import distractors, draw_queries, matchable, split_validation, unrankable
from pmm.evaluation.metrics import evaluate_ranking
from pmm.utils.errors import InvalidValue
from tests.refusals import refuses


def crops(pids, cameras, each):
    return tuple(
        Sample(Path(f"{p}_{c}_{i}"), p, c) for p in range(1, pids + 1) for c in range(cameras) for i in range(each)
    )


def ids(samples):
    return [(sample.pid, sample.camid) for sample in samples]


def test_validation_identities_are_held_out_whole():
    train = crops(10, 3, 2)
    split = split_validation(train, 0.2, seed=0)
    held = {s.pid for s in split.query}
    assert len(held) == 2
    assert held == {s.pid for s in split.gallery}
    assert not held & {s.pid for s in split.train}
    assert set(split.train) | set(split.query) | set(split.gallery) == set(train)
    assert ids(split.query) == sorted((p, c) for p in held for c in range(3))
    assert split == split_validation(train, 0.2, seed=0)
    assert split != split_validation(train, 0.2, seed=3)


def test_no_validation_and_unusable_validation():
    train = crops(10, 3, 2)
    assert split_validation(train, 0.0, seed=0).train == train
    with refuses(InvalidValue, "2 identities", "two cameras", name="--val-identities", value=0.2, expected="0 or "):
        split_validation(crops(10, 1, 2), 0.2, seed=0)


def test_validation_where_cameras_are_unknown():
    def unknown(each):
        return tuple(sample._replace(camid=UNKNOWN_CAMERA) for sample in crops(10, 1, each))

    split = split_validation(unknown(3), 0.2, seed=0)
    held = sorted({sample.pid for sample in split.query})
    assert ids(split.query) == [(pid, 0) for pid in held]
    assert ids(split.gallery) == [(pid, 1) for pid in held for _ in range(2)]
    assert {sample.camid for sample in split.train} == {UNKNOWN_CAMERA}
    with refuses(InvalidValue, "2 identities", "two crops", name="--val-identities", value=0.2, expected="0 or "):
        split_validation(unknown(1), 0.2, seed=0)


SAMPLES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=40).map(
    lambda pairs: [Sample(Path(str(index)), *pair) for index, pair in enumerate(pairs)]
)


@given(SAMPLES)
def test_drawn_queries_are_the_first_of_each_identity_and_camera(samples):
    query, gallery = draw_queries(samples)
    assert sorted([*query, *gallery]) == sorted(samples)
    assert len(set(ids(query))) == len(query)
    assert set(ids(gallery)) <= set(ids(query))
    for sample in query:
        assert sample == next(other for other in samples if ids([other]) == ids([sample]))


@given(SAMPLES, SAMPLES)
def test_matchable_queries_are_those_that_evaluation_counts(query, gallery):
    fine = matchable(query, gallery)
    if not any(fine):
        return
    rng = np.random.default_rng(0)
    (q_pids, q_cams), (g_pids, g_cams) = (np.array(ids(part)).T for part in (query, gallery))
    result = evaluate_ranking(
        rng.normal(size=(len(query), 2)), rng.normal(size=(len(gallery), 2)), q_pids, g_pids, q_cams, g_cams
    )
    assert (result.first_rank > 0).tolist() == fine
    assert result.skipped == fine.count(False)


def test_what_cannot_be_ranked():
    def crops(*ids):
        return tuple(Sample(Path("a.jpg"), pid, camid) for pid, camid in ids)

    assert "no query has a gallery crop" in unrankable(crops((1, 0)), crops((1, 0), (2, 1)))
    assert "of one identity" in unrankable(crops((1, 0), (1, 1)), crops((1, 2)))
    assert not unrankable(crops((1, 0)), crops((1, 1), (2, 1)))
    assert not unrankable(crops((1, 0), (2, 0)), crops((1, 1)))


def test_distractors_are_people_who_are_no_query_whatever_their_number():
    query = [Sample(Path("q"), pid, 1) for pid in (0, 5)]
    gallery = [Sample(Path("g"), pid, 2) for pid in (0, 0, 5, 7, 8, 8)]
    assert distractors(query, gallery) == 3
