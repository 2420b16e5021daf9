"""pmm.evaluate: the figures of `pmm evaluate`, of files, of an open runner and of lists of one's own."""

import csv
import json
import shutil

import numpy as np
import pytest

import pmm
from pmm.data.readers import read_dataset
from pmm.evaluation.ranking import figures
from tests.conftest import run_here
from tests.refusals import refuses


@pytest.fixture(scope="module")
def split(people):
    return read_dataset("market1501", people)


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ((), {}),
        (
            (
                "--metric",
                "cosine",
                "--ap",
                "trapezoid",
                "--flip-test",
                "--rerank",
                "--k1",
                "7",
                "--rerank-lambda",
                "0.5",
            ),
            {"metric": "cosine", "ap": "trapezoid", "flip_test": True, "reranking": pmm.Reranking(k1=7, weight=0.5)},
        ),
    ],
    ids=["defaults", "all choices"],
)
def test_it_gives_the_figures_of_the_command(exported, people, tmp_path, flags, arguments):
    out, lines = tmp_path / "a.json", tmp_path / "a.csv"
    where = ("--dataset", "market1501", "--root", people, "--json", out, "--per-query", lines)
    done = run_here("-m", "pmm", "evaluate", exported, *where, *flags)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    result = pmm.evaluate(exported, "market1501", people, **arguments)
    assert figures(result) == {name: told[name] for name in figures(result)}
    for name in ("backend", "precision", "metric", "ap", "flip_test"):
        assert getattr(result, name) == told[name], name
    assert (result.reranking and vars(result.reranking)) == told["reranking"]
    rows = list(csv.DictReader(lines.open()))
    assert [row["query"] for row in rows] == [str(sample.path) for sample in result.dataset.query]
    np.testing.assert_allclose([float(row["AP"]) for row in rows], result.per_query_ap, atol=1e-6)


def test_a_file_and_a_runner_that_stays_open_give_the_same(trained, people, split):
    expected = pmm.evaluate(str(trained), "market1501", str(people), device="cpu")
    with pmm.open_runner(trained, device="cpu") as runner:
        for data in (("market1501", people), (split,)):
            found = pmm.evaluate(runner, *data)
            assert found.mAP == expected.mAP
            np.testing.assert_array_equal(found.per_query_ap, expected.per_query_ap)
        with refuses(pmm.ConflictingOptions, "open runner", "device"):
            pmm.evaluate(runner, "market1501", people, device="cpu")
        assert runner(pmm.load_crops([split.query[0].path], runner.preprocessing)).shape == (1, runner.embedding.dim)
    assert (expected.backend, expected.dataset.name) == ("torch", "market1501")


def test_lists_of_ones_own_are_ranked_as_they_are(exported, split):
    query = split.query[::3]
    copies = tuple(sample._replace(camid=sample.camid + 100) for sample in query)
    assert pmm.evaluate(exported, pmm.ReidDataset(train=(), query=query, gallery=copies)).rank1 == 1
    with refuses(pmm.InvalidInput, "no query has a gallery crop of its identity"):
        pmm.evaluate(exported, pmm.ReidDataset(train=(), query=query[:1], gallery=query[:1]))


def test_images_that_are_left_out_are_listed(exported, people, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    bad = min((root / "query").glob("*.jpg"))
    bad.write_bytes(b"")
    with refuses(pmm.InvalidFile, bad.name, path=root):
        pmm.evaluate(exported, "market1501", root)
    result = pmm.evaluate(exported, "market1501", root, skip_bad_images=True)
    assert {name: [*files] for name, files in result.unreadable.items()} == {"query": [bad], "gallery": []}
    assert bad not in [sample.path for sample in result.dataset.query]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"metric": "euclid"}, "metric"),
        ({"ap": "map"}, "ap"),
        ({"batch_size": 0}, "batch_size"),
        ({"threads": -1}, "threads"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_before_crops_are_read(exported, split, wrong, name, monkeypatch):
    monkeypatch.setattr("pmm.embedding.embed.iter_crops", None)
    with refuses(pmm.InvalidValue, *wrong.values(), name=name):
        pmm.evaluate(exported, split, **wrong)
