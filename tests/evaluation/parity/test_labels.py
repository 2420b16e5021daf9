import numpy as np
import pytest

from pmm.evaluation.parity.labels import QueryGallery
from pmm.utils.errors import UserError
from tests.evaluation.parity.problems import labels_of


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
    ("arguments", "text"),
    [
        (([1], [1, 2], [0], [0]), r"gallery: pids \[2\], camids \[1\]"),
        (([[1]], [1], [[0]], [0]), r"query: pids \[1, 1\]"),
        (([1], [], [0], []), r"gallery: pids \[0\]"),
        (([1], [2, -1], [0], [0, 0]), r"gallery: item 1 has pid -1 \(junk\)"),
    ],
)
def test_labels_that_are_refused(arguments, text):
    with pytest.raises(UserError, match=text):
        labels_of(*arguments)


@pytest.mark.parametrize(
    ("query", "gallery", "text"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), r"its embeddings .* \[2, 3\], \[2, 3\]; expected \[1, D\], \[2, D\]"),
        (np.zeros((1, 3)), np.zeros((1, 3)), r"\[1, 3\], \[1, 3\]"),
        (np.zeros((1, 3)), np.zeros((2, 4)), r"\[1, 3\], \[2, 4\]"),
        (np.zeros(1), np.zeros(2), r"\[1\], \[2\]"),
        (np.zeros((1, 3)), np.array([[0.0], [np.inf]]) + np.zeros(3), "1 of 2 its .* gallery hold NaN .* is row 1"),
        (np.full((1, 3), np.nan), np.zeros((2, 3)), "1 of 1 its embeddings of the query"),
    ],
)
def test_embeddings_that_do_not_fit(query, gallery, text):
    labels = labels_of([1], [1, 2], [0], [1, 1])
    labels.check(QueryGallery(np.zeros((1, 3)), np.zeros((2, 3))), "its")
    with pytest.raises(UserError, match=text):
        labels.check(QueryGallery(query, gallery), "its")
