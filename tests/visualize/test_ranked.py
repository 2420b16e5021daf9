"""Lists of a whole test set: the queries from the hardest to the easiest, and what is really first for them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm.data.samples import ReidDataset, Sample
from pmm.evaluation.metrics import evaluate_ranking
from pmm.evaluation.parity.labels import QueryGallery
from pmm.utils.errors import InvalidFile
from pmm.visualize import ranked
from pmm.visualize.lists import RIGHT, WRONG
from pmm.visualize.ranked import compared_picture, ranked_picture, rows, spread
from tests.refusals import refuses


def test_queries_are_spread_over_the_scores():
    scores = np.array([0.9, np.nan, 0.1, 0.5, 0.3, 0.7, np.nan])
    assert spread(scores, 3, ends=0).tolist() == [2, 3, 0]
    assert spread(scores, 9, ends=0).tolist() == [2, 4, 3, 5, 0]
    hundred = np.arange(101)[::-1] / 100
    assert spread(hundred, 3).tolist() == [95, 50, 5]


@pytest.fixture
def split(tmp_path):
    def sample(number, pid, camid):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (16, 32), (10 * number, 90, 200)).save(path)
        return Sample(path, pid, camid)

    gallery = [(1, 0), (1, 1), (2, 1), (0, 2), (2, 2)]
    return ReidDataset(
        train=(),
        query=(sample(10, 1, 0), sample(11, 2, 0)),
        gallery=tuple(sample(i, *who) for i, who in enumerate(gallery)),
    )


def place(*values):
    return np.array(values, np.float32)[:, None]


# on a line: the first query at 0, the second at 10
GOOD = QueryGallery(place(0, 10), place(0.1, 1, 9, 5, 11.5))
BAD = QueryGallery(place(0, 10), place(0.1, 8, 1, 3, 2))


def scores(split, embedded):
    pids = [[sample.pid for sample in part] for part in (split.query, split.gallery)]
    camids = [[sample.camid for sample in part] for part in (split.query, split.gallery)]
    return evaluate_ranking(*embedded, *pids, *camids).per_query_ap


def test_rows_are_the_first_items_without_junk(split):
    first, second = rows(split, GOOD, np.array([0, 1]), 3)
    named = [[(int(path.stem), right) for path, right in row] for row in (first, second)]
    assert named[0] == [(1, True), (3, False), (2, False)], "item 0 is of the query's own camera"
    assert named[1] == [(2, True), (4, True), (3, False)]
    assert [len(row) for row in rows(split, GOOD, np.array([0]), 9)] == [4]


def colours(picture, colour):
    return int((np.asarray(picture) == colour).all(axis=2).sum())


def test_both_pictures_show_right_and_wrong(split):
    good, bad = ((embedded, scores(split, embedded)) for embedded in (GOOD, BAD))
    right = ranked_picture(split, *good, queries=2, items=1)
    wrong = ranked_picture(split, *bad, queries=2, items=1)
    assert right.size == wrong.size
    legend = min(colours(right, WRONG), colours(wrong, RIGHT))  # both are always explained there
    assert colours(right, RIGHT) > 3 * legend
    assert colours(wrong, WRONG) > 3 * legend
    both = compared_picture(split, bad, good, heads=("bad", "good"), queries=2, items=1)
    left, other = both.crop((0, 0, both.width // 2, 200)), both.crop((both.width // 2, 0, both.width, 200))
    assert colours(left, WRONG) > 0 == colours(left, RIGHT)
    assert colours(other, RIGHT) > 0 == colours(other, WRONG)


def test_compared_queries_begin_with_the_one_that_lost_most(split, monkeypatch):
    shown = {}
    monkeypatch.setattr(ranked, "compared_lists", lambda queries, before, after, **how: shown.update(how, q=queries))
    before, after = (GOOD, np.array([0.9, 0.2])), (BAD, np.array([0.5, 0.3]))
    compared_picture(split, before, after, heads=("a", "b"), queries=1)
    assert shown["q"] == [split.query[0].path]
    assert shown["titles"] == ["AP 90% -> 50%"]


def test_a_crop_that_is_gone_is_named(split):
    Path(split.gallery[1].path).unlink()
    with refuses(InvalidFile, path=split.gallery[1].path):
        ranked_picture(split, GOOD, scores(split, GOOD))
