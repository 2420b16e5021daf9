"""Thresholds from people whom one camera sees at once: which pairs count, and what is promised of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.camera_threshold import POPULATIONS, even, site, true_rates
from pmm.evaluation.camera_threshold import camera_threshold, pairs_seen_at_once
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
    camera, time, person = (
        rng.integers(0, 3, crops),
        rng.integers(0, 12, crops).astype(float),
        rng.integers(0, 5, crops),
    )
    seen = pairs_seen_at_once(camera, time, same_time=same_time, person=person if known else None, stretch=5)
    expected = {
        (i, j) for i in range(crops) for j in range(i + 1, crops)
        if camera[i] == camera[j] and abs(time[i] - time[j]) <= same_time and not (known and person[i] == person[j])
    }  # fmt: skip
    assert as_set(seen) == expected
    assert len(seen.first) == len(expected)
    if known:
        couples = {tuple(sorted((person[i], person[j]))) for i, j in expected}
        assert seen.weight.sum() == pytest.approx(len(couples))
        assert seen.people == len({one for couple in couples for one in couple})


def test_a_pair_of_people_counts_once_however_many_crops_show_it():
    # persons 0 and 1 together in 100 moments, 0 and 2 in one
    camera, time = np.zeros(202), np.r_[np.arange(100).repeat(2), 500, 500]
    person = np.r_[np.tile([0, 1], 100), 0, 2]
    seen = pairs_seen_at_once(camera, time, person=person)
    assert seen.weight.tolist() == [0.01] * 100 + [1.0]
    found = camera_threshold(np.r_[np.full(100, 5.0), 1.0], seen, 0.9)
    assert found.people == 3
    assert found.people_pairs == 2


def test_where_people_are_unknown_a_stretch_of_time_counts_for_its_fullest_moment():
    camera = np.array(list("aabbbaa"))
    time = np.array([0.0, 0, 1, 1, 1, 700, 700])
    seen = pairs_seen_at_once(camera, time, stretch=600)
    assert seen.people == 3 + 2
    assert seen.weight.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]
    assert seen.one.tolist() == seen.other.tolist() == [0, 1, 0, 0, 0]
    twice = pairs_seen_at_once(np.repeat("a", 8), np.repeat([0.0, 1, 2, 3], 2), stretch=600)
    assert twice.people == 2
    assert twice.weight.tolist() == [0.25] * 4


@pytest.mark.parametrize("known", [True, False])
def test_the_threshold_lies_between_what_is_accepted_and_the_next(known):
    centres = even(np.random.default_rng(0), 300)
    distances, seen = site(np.random.default_rng(1), centres, known=known)
    found = camera_threshold(distances, seen, 0.05)
    assert found.distance is not None
    accepted = distances <= found.distance
    assert found.estimate == pytest.approx(seen.weight[accepted].sum() / seen.weight.sum())
    assert found.estimate < found.upper <= 0.05
    assert found.people_needed == found.people == 300
    stricter = camera_threshold(distances, seen, 0.05, confidence=0.999)
    assert stricter.distance is None or stricter.distance < found.distance


def test_too_few_people_are_told_how_many_would_do():
    distances, seen = site(np.random.default_rng(0), even(np.random.default_rng(1), 20), known=True)
    found = camera_threshold(distances, seen, 1e-3)
    assert found.distance is None
    assert found.upper > 1e-3
    assert found.people_needed > 100


def test_copies_of_the_same_moment_make_nothing_surer():
    """It is people that count, not pairs of crops."""
    distances, seen = site(np.random.default_rng(0), even(np.random.default_rng(1), 60), known=True)
    many = seen._replace(
        **{name: np.tile(getattr(seen, name), 5) for name in ("first", "second", "group", "one", "other")}
    )
    many = many._replace(weight=np.tile(seen.weight, 5) / 5)
    once, again = camera_threshold(distances, seen, 0.02), camera_threshold(np.tile(distances, 5), many, 0.02)
    assert (again.distance, again.people_pairs) == (once.distance, once.people_pairs)
    assert again.upper == pytest.approx(once.upper)


def test_what_holds_for_any_population_takes_more_people():
    distances, seen = site(np.random.default_rng(0), even(np.random.default_rng(1), 400), known=True)
    assert camera_threshold(distances, seen, 0.05).distance is not None
    anyhow = camera_threshold(distances, seen, 0.05, guaranteed=True)
    assert anyhow.distance is not None
    assert anyhow.distance < camera_threshold(distances, seen, 0.05).distance
    # 400 * 20 pairs, in 41 sets of pairs without a common person
    none = camera_threshold(distances, seen, 0.01, guaranteed=True)
    assert none.distance is None
    assert none.people_needed > 400
    sure, rate, upper = 8000 / 41, none.estimate, none.upper
    entropy = rate * np.log(rate / upper) + (1 - rate) * np.log((1 - rate) / (1 - upper))
    assert sure * entropy == pytest.approx(np.log(20), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "sites"), [("groups", 20), *(pytest.param(name, 300, marks=pytest.mark.slow) for name in POPULATIONS)]
)
def test_the_promise_is_kept_on_synthetic_sites(name, sites):
    """95 % of the time; bench.lab.camera_threshold tries many more."""
    population, target = POPULATIONS[name], 0.05
    truth = true_rates(population, 60_000 if sites == 20 else 1_000_000)
    rates = []
    for number in range(sites):
        rng = np.random.default_rng(number)
        found = camera_threshold(*site(rng, population(rng, 60), known=True), target)
        if found.distance is not None:
            rates.append(np.searchsorted(truth, found.distance, "right") / len(truth))
    assert len(rates) >= sites / 2
    least = 0.95 - 2 * (0.95 * 0.05 / sites) ** 0.5
    assert np.mean(np.array(rates) <= target) >= least
    assert np.median(rates) > target / 4, "so careful that it is of no use"


@pytest.mark.parametrize(
    ("change", "kind", "facts"),
    [
        ({"fmr": 0.0}, InvalidValue, {"name": "fmr"}),
        ({"fmr": float("nan")}, InvalidValue, {"name": "fmr"}),
        ({"confidence": 1.0}, InvalidValue, {"name": "confidence"}),
    ],
)
def test_bad_shares(change, kind, facts):
    distances, seen = site(np.random.default_rng(0), even(np.random.default_rng(1), 10), known=True)
    with refuses(kind, **facts):
        camera_threshold(distances, seen, **{"fmr": 0.1, **change})


def test_without_people_seen_together_there_is_nothing_to_tell():
    seen = pairs_seen_at_once(["a", "b"], [0.0, 0.0])
    with refuses(InvalidInput, "0 pairs", "0 people"):
        camera_threshold([], seen, 0.1)
    with refuses(InvalidInput, "have no time", index=1):
        pairs_seen_at_once(["a", "b"], [0.0, float("nan")])
    with refuses(InvalidValue, name="stretch"):
        pairs_seen_at_once(["a"], [0.0], stretch=0)
    with refuses(InvalidValue, name="same_time"):
        pairs_seen_at_once(["a"], [0.0], same_time=-1)
    with refuses(InvalidInput, "[2]", "[1]"):
        pairs_seen_at_once(["a", "b"], [0.0])
