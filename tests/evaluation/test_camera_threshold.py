"""Thresholds from people whom one camera sees at once: which pairs count, and what is promised of them."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.camera_threshold import SITES, Site, simulate, strangers
from pmm.evaluation import camera_threshold as module
from pmm.evaluation.camera_threshold import WINDOW, SeenAtOnce, camera_threshold, pairs_seen_at_once
from pmm.utils.errors import InvalidInput, InvalidValue
from tests.conftest import examples
from tests.refusals import refuses


def as_set(seen):
    return {tuple(sorted(pair)) for pair in zip(seen.first.tolist(), seen.second.tolist(), strict=True)}


@examples(60)
@given(
    seed=st.integers(0, 1 << 30), crops=st.integers(0, 40), same_time=st.sampled_from([0.0, 1.0, 2.5]),
    known=st.booleans(),
)  # fmt: skip
def test_pairs_are_those_of_one_camera_at_one_time(seed, crops, same_time, known):
    rng = np.random.default_rng(seed)
    camera, time, person = (rng.integers(0, 3, crops), rng.integers(0, 12, crops) * 1.0, rng.integers(0, 5, crops))
    seen = pairs_seen_at_once(camera, time, same_time=same_time, person=person if known else None, stretch=48)
    expected = {
        (i, j) for i in range(crops) for j in range(i + 1, crops)
        if camera[i] == camera[j] and abs(time[i] - time[j]) <= same_time and not (known and person[i] == person[j])
    }  # fmt: skip
    assert as_set(seen) == expected
    assert len(seen.first) == len(expected)
    assert seen.stretches == bool(expected)


@examples(60)
@given(seed=st.integers(0, 1 << 30), crops=st.integers(0, 60), stretch=st.sampled_from([4.0, 10.0]))
def test_stretches_share_no_person_who_stays_no_longer(seed, crops, stretch):
    rng = np.random.default_rng(seed)
    time = rng.integers(0, 100, crops) * 1.0
    person = rng.integers(0, 20, crops)
    for names in (None, person):
        seen = pairs_seen_at_once(np.zeros(crops), time, stretch=stretch, person=names)
        times = [time[np.r_[seen.first, seen.second][np.r_[seen.stretch, seen.stretch] == i]] for i in
                 range(seen.stretches)]  # fmt: skip
        assert all(np.ptp(each) <= WINDOW * stretch for each in times)
        assert all(after.min() - before.max() > stretch for before, after in pairwise(times))
    counted = {(person[row], number) for row, number in zip(np.r_[seen.first, seen.second].tolist(),
               np.r_[seen.stretch, seen.stretch].tolist(), strict=True)}  # fmt: skip
    assert len(counted) == len({name for name, _ in counted}), "who comes again under one name counts once"


def test_of_very_many_pairs_some_are_drawn():
    crops = 3_000  # 4,498,500 pairs at one time; and ten at another
    time = np.r_[np.zeros(crops), np.full(5, 100.0)]
    seen = pairs_seen_at_once(np.zeros(len(time)), time, stretch=10)
    assert np.bincount(seen.stretch).tolist() == [module.PAIRS_PER_STRETCH, 10]
    assert (seen.first != seen.second).all()
    assert len(np.unique(seen.first[:-10])) > 1_000, "of all crops"
    assert seen.second[:-10].max() < crops
    assert as_set(seen._replace(first=seen.first[-10:], second=seen.second[-10:])) == {
        (crops + i, crops + j) for i in range(5) for j in range(i + 1, 5)
    }


def of_stretches(shares, pairs=20):
    """Pairs of stretches in which these shares lie at distance 1, and the others at 2."""
    stretch = np.arange(len(shares)).repeat(pairs)
    near = np.tile(np.arange(pairs), len(shares)) < (np.array(shares) * pairs).repeat(pairs)
    rows = np.arange(len(stretch))
    return np.where(near, 1.0, 2.0), SeenAtOnce(rows, rows + 1, stretch, len(shares))


def test_the_bound_is_that_of_a_fair_bet():
    shares = [0.0, 0.5, 0.1, 0.0, 1.0, 0.0] * 20
    found = camera_threshold(*of_stretches(shares), 0.45)
    assert (found.stretches, found.pairs, found.distance) == (120, 2400, 1.5)
    assert found.estimate == pytest.approx(np.mean(shares))
    won = sum(
        part * math.prod(1 + stake * (found.upper - share) / (1 - found.upper) for share in shares)
        for part, stake in zip((0.7, 0.1, 0.1, 0.1), (1, 0.5, 0.25, 0.125), strict=True)
    )
    assert won == pytest.approx(20)
    assert np.mean(shares) < found.upper < 0.45
    surer = camera_threshold(*of_stretches(shares), 0.3, confidence=0.999)
    assert surer.distance == pytest.approx(1, abs=1e-9)
    assert surer.distance < 1, "the nearest pairs are too many to be accepted"
    assert surer.estimate == 0


def test_stretches_count_alike_however_many_pairs_they_show():
    rows = np.arange(1100)
    stretch = np.r_[np.zeros(1000, np.int64), np.arange(1, 101)]
    distances = np.r_[np.full(1000, 1.0), np.full(100, 2.0)]  # a crowd that is alike
    found = camera_threshold(distances, SeenAtOnce(rows, rows, stretch, 101), 0.2)
    assert found.distance == 1.5
    assert found.estimate == pytest.approx(1 / 101)


def test_too_few_stretches_are_told_how_many_would_do():
    distances, seen = strangers(np.random.default_rng(0), 300).pairs()
    found = camera_threshold(distances, seen, 0.01)
    assert found.distance is None
    assert found.upper > 0.01
    assert 300 < found.stretches_needed < 400
    distances, seen = strangers(np.random.default_rng(0), found.stretches_needed).pairs()
    assert camera_threshold(distances, seen, 0.01).distance is not None


def test_crops_at_distance_0_leave_no_threshold():
    distances, seen = of_stretches([0.1] * 400)
    found = camera_threshold(distances - 1, seen, 0.05)
    assert (found.distance, found.stretches_needed) == (None, None)
    assert found.estimate == pytest.approx(0.1)
    fewer = camera_threshold(distances - 1, seen, 0.101)
    assert fewer.distance is None
    assert fewer.stretches_needed > 400
    assert camera_threshold(distances - 1, seen, 0.2).distance == 0.5


def test_between_neighbouring_numbers_the_threshold_does_not_take_the_next():
    distances, seen = of_stretches([0.01] * 400, pairs=100)
    near = np.nextafter(1.0, 2)
    following = np.nextafter(near, 2)
    assert near + (following - near) / 2 == following, "it is rounded up"
    found = camera_threshold(np.where(distances == 2, following, near), seen, 0.05)
    assert found.distance == near


def test_the_promise_is_kept_on_ordinary_sites():
    """bench.lab.camera_threshold tries many more."""
    rows = simulate(20, stretches=(10, 40), targets=(0.1,), truth=3_000)
    assert {row["site"] for row in rows} == set(SITES)
    for row in rows:
        given = row["sites"] - row["abstained"]
        assert given == (20 if row["stretches"] == 40 and row["site"] not in ("regulars", "tracks") else 0)
        assert row["held"] >= given - 2, row
        assert not given or row["ratio"][1] > 0.02, "so careful that it is of no use"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bland", "rare crowds", "staff"])
def test_the_promise_is_kept_at_its_confidence(name):
    (row,) = simulate(300, stretches=(400,), targets=(0.01,), truth=50_000, names=[name])
    assert row["abstained"] == 0
    assert row["held"] >= 300 * (0.95 - 2 * (0.95 * 0.05 / 300) ** 0.5)


def test_who_is_in_all_pictures_counts_once():
    site = SITES["staff"](np.random.default_rng(0), 50)
    everywhere = Site(site.points, site.time, stretch=site.stretch)
    assert len(everywhere.pairs()[1].first) - len(site.pairs()[1].first) == 2 * 4 * 49


@pytest.mark.parametrize(
    ("change", "kind", "facts"),
    [
        ({"fmr": 0.0}, InvalidValue, {"name": "fmr"}),
        ({"fmr": float("nan")}, InvalidValue, {"name": "fmr"}),
        ({"confidence": 1.0}, InvalidValue, {"name": "confidence"}),
        ({"confidence": 0.5}, InvalidValue, {"name": "confidence"}),
    ],
)
def test_bad_shares(change, kind, facts):
    distances, seen = strangers(np.random.default_rng(0), 3).pairs()
    with refuses(kind, **facts):
        camera_threshold(distances, seen, **{"fmr": 0.1, **change})


def test_without_people_seen_together_there_is_nothing_to_tell():
    seen = pairs_seen_at_once(["a", "b"], [0.0, 0.0], stretch=9)
    with refuses(InvalidInput, "no two people"):
        camera_threshold([], seen, 0.1)
    with refuses(InvalidInput, "have no time", index=1):
        pairs_seen_at_once(["a", "b"], [0.0, float("nan")], stretch=9)
    with refuses(InvalidValue, name="stretch"):
        pairs_seen_at_once(["a"], [0.0], stretch=0)
    for same_time in (-1, 3):
        with refuses(InvalidValue, name="same_time"):
            pairs_seen_at_once(["a"], [0.0], stretch=9, same_time=same_time)
    with refuses(InvalidInput, "[2]", "[1]"):
        pairs_seen_at_once(["a", "b"], [0.0], stretch=9)
