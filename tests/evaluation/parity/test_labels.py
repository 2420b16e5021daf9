import numpy as np
import pytest

from pmm.evaluation.parity.labels import QueryGallery
from pmm.utils.errors import InvalidInput
from tests.evaluation.parity.problems import labels_of
from tests.refusals import refuses


def test_masks_by_hand():
    # gallery: the person elsewhere, the person here, another here, a distractor elsewhere
    labels = labels_of([7, 8], [7, 7, 9, 0], [0, 1], [1, 0, 0, 1])
    relevant, junk = labels.masks(slice(0, 1))
    assert relevant.tolist() == [[True, False, False, False]]
    assert junk.tolist() == [[False, True, False, False]]
    relevant, junk = labels.masks(np.array([1, 0]), slice(1, 3))
    assert relevant.tolist() == [[False, False], [False, False]]
    assert junk.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (([1], [1, 2], [0], [0]), ("gallery", "pids [2]", "camids [1]")),
        (([[1]], [1], [[0]], [0]), ("query", "pids [1, 1]")),
        (([1], [], [0], []), ("gallery", "pids [0]")),
        (([1], [2, -1], [0], [0, 0]), ("gallery", "item 1", "pid -1")),
    ],
)
def test_labels_that_are_refused(arguments, facts):
    with refuses(InvalidInput, *facts):
        labels_of(*arguments)


@pytest.mark.parametrize(
    ("query", "gallery", "facts"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), ("[2, 3], [2, 3]", "[1, D], [2, D]")),
        (np.zeros((1, 3)), np.zeros((1, 3)), ("[1, 3], [1, 3]",)),
        (np.zeros((1, 3)), np.zeros((2, 4)), ("[1, 3], [2, 4]",)),
        (np.zeros(1), np.zeros(2), ("[1], [2]",)),
        (np.zeros((1, 3)), np.array([[0.0], [np.inf]]) + np.zeros(3), ("gallery: 1 of 2", "NaN", "row 1")),
        (np.full((1, 3), np.nan), np.zeros((2, 3)), ("query: 1 of 1", "NaN")),
    ],
)
def test_embeddings_that_do_not_fit(query, gallery, facts):
    labels = labels_of([1], [1, 2], [0], [1, 1])
    labels.check(QueryGallery(np.zeros((1, 3)), np.zeros((2, 3))), "int8")
    with refuses(InvalidInput, "int8 embeddings", *facts):
        labels.check(QueryGallery(query, gallery), "int8")
