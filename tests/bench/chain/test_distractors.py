"""Made-up people: the stated model, and how near their distances come to those of others."""

import numpy as np
import pytest

from pmm.bench.chain.distractors import CROPS, EXPANSION, QUANTILES, SPREAD, DistractorRecipe, impostor_quantiles
from pmm.utils.errors import InvalidInput
from tests.refusals import refuses

DIM, PEOPLE, OF_EACH = 24, 150, 8


def people(seed, count=PEOPLE, crops=OF_EACH):
    """Embeddings that a network could make: none negative, people near each other, crops near their person."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(8, DIM))
    centres = rng.normal(size=(count, 8)) @ mixing + 2
    pids = np.repeat(np.arange(count), crops)
    rows = centres[pids] + 0.8 * rng.normal(size=(len(pids), DIM))
    return rows.clip(min=0).astype(np.float32), pids


TRAIN, PIDS = people(1)


def made(recipe, train=TRAIN):
    return np.concatenate(list(recipe.rows(train)))


def test_each_person_is_between_neighbours_and_crops_are_around_it():
    positive, pids = TRAIN + 50, PIDS  # nothing is clipped
    recipe = DistractorRecipe.of(positive, pids, 400)
    rows = made(recipe, positive).reshape(40, CROPS, DIM).astype(np.float64)
    centroids = positive.reshape(PEOPLE, OF_EACH, DIM).mean(1)
    assert (recipe.neighbours[:, 0] == np.arange(PEOPLE)).all()
    gaps = np.linalg.norm(centroids[:, None] - centroids, axis=2)
    np.fill_diagonal(gaps, np.inf)
    assert (np.sort(recipe.neighbours[:, 1:]) == np.sort(np.argsort(gaps, axis=1)[:, :2])).all()
    residuals = (positive - centroids[pids]).std()
    within = (rows - rows.mean(1, keepdims=True)).std() * np.sqrt(CROPS / (CROPS - 1))
    assert within == pytest.approx(SPREAD * residuals, rel=0.1)
    assert rows.mean() == pytest.approx(EXPANSION * positive.mean(), rel=0.02)


def test_none_is_negative_where_none_was_and_all_are_at_norm_1_where_all_were():
    recipe = DistractorRecipe.of(TRAIN, PIDS, 200)
    assert made(recipe).min() == 0
    assert made(recipe, TRAIN - 1).min() < 0
    unit = TRAIN / np.linalg.norm(TRAIN, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(made(recipe, unit), axis=1), 1, atol=1e-6)


def test_two_backends_get_the_same_people():
    recipe = DistractorRecipe.of(TRAIN, PIDS, 300)
    rows, scaled = made(recipe, TRAIN + 50), made(recipe, 3 * (TRAIN + 50))
    np.testing.assert_allclose(scaled, 3 * rows, rtol=1e-5)
    again = made(DistractorRecipe.of(TRAIN, PIDS, 300), TRAIN + 50)
    np.testing.assert_array_equal(rows, again)
    other = made(DistractorRecipe.of(TRAIN, PIDS, 300, seed=1), TRAIN + 50)
    assert abs(other - rows).mean() > 0.1


def test_a_larger_number_begins_with_the_same_rows():
    few, many = (made(DistractorRecipe.of(TRAIN, PIDS, count)) for count in (15_003, 25_000))
    assert (len(few), len(many)) == (15_003, 25_000)
    np.testing.assert_array_equal(few, many[:15_003])


def test_labels_are_of_nobody_else():
    recipe = DistractorRecipe.of(TRAIN, PIDS, 25)
    pids, camids = recipe.pids(1000), recipe.camids(np.array([2, 5]))
    assert pids.tolist() == [1000] * 10 + [1001] * 10 + [1002] * 5
    assert set(camids.tolist()) == {2, 5}


def test_impostor_quantiles_come_near_those_of_real_people():
    """Of people that the model has not seen, drawn as the training part was."""
    rows, pids = people(2)
    query, gallery = rows[::OF_EACH], np.delete(rows, slice(None, None, OF_EACH), 0)
    impostors = pids[::OF_EACH][:, None] != np.delete(pids, slice(None, None, OF_EACH))
    found = impostor_quantiles(query, gallery, impostors, made(DistractorRecipe.of(TRAIN, PIDS, 2000)))
    assert [share for share, _, _ in found] == list(QUANTILES)
    for _, real, made_up in found:
        assert made_up == pytest.approx(real, rel=0.12)
    gaps = np.linalg.norm(query[:, None].astype(np.float64) - gallery, axis=2)[impostors]
    assert found[-1][1] == pytest.approx(np.median(gaps))


def test_two_identities_are_too_few():
    with refuses(InvalidInput, "2 identities", expected="3"):
        DistractorRecipe.of(TRAIN, PIDS % 2, 10)
