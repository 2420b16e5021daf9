"""pmm evaluate: the figures of any artifact, and what they depend on."""

import csv
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.checkpoint import load, save
from pmm.data.readers import read_dataset
from pmm.data.samples import camids_of, pids_of
from pmm.embedding.embed import embed_samples
from pmm.evaluation.metrics import evaluate_distances, evaluate_ranking
from pmm.evaluation.reranking import Reranking, reranked
from pmm.export.options import ExportOptions
from pmm.models.registry import METHODS
from pmm.runtime.open import open_runner
from pmm.runtime.ort import OrtRunner
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, run_here, run_python, run_without_torch


def png(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (32, 16, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def split(people):
    return read_dataset("market1501", people)


@pytest.fixture(scope="module")
def embedded(trained, split):
    with open_runner(trained) as runner:
        parts = [embed_samples(runner, part) for part in (split.query, split.gallery)]
        mirrored = [embed_samples(runner, part, flip=True) for part in (split.query, split.gallery)]
    return parts, mirrored


def labels_of(split):
    return pids_of(split.query), pids_of(split.gallery), camids_of(split.query), camids_of(split.gallery)


def evaluate(file, people, *args):
    return run_here("-m", "pmm", "evaluate", file, "--dataset", "market1501", "--root", people, *args)


def figures(done, path):
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_any_artifact_gives_the_figures_of_the_checkpoint(trained, exported, people, tmp_path, embedded, split):
    expected = evaluate_ranking(*embedded[0], *labels_of(split))
    found = figures(evaluate(trained, people, "--json", tmp_path / "a.json"), tmp_path / "a.json")
    assert found["mAP"] == expected.mAP
    assert (found["backend"], found["metric"], found["ap"]) == ("torch", "euclidean", "standard")
    assert (found["artifact"], found["artifact_sha256"]) == (str(trained), sha256(trained))
    assert (found["dataset"], found["root"], found["notes"]) == ("market1501", str(people), [])
    assert (found["queries"], found["gallery"]) == (len(split.query), len(split.gallery))
    done = run_without_torch(
        "-m", "pmm", "evaluate", exported, "--dataset", "market1501", "--root", people, "--json", tmp_path / "b.json"
    )
    found = figures(done, tmp_path / "b.json")
    assert found["mAP"] == pytest.approx(expected.mAP, abs=1e-3)
    assert found["backend"] == "ort-cpu"


def test_a_checkpoint_names_its_data_set(trained, exported, people, tmp_path, embedded, split, monkeypatch):
    expected = evaluate_ranking(*embedded[0], *labels_of(split)).mAP
    out = tmp_path / "a.json"
    found = figures(run_here("-m", "pmm", "evaluate", trained, "--json", out), out)
    assert (found["mAP"], found["dataset"], found["root"]) == (expected, "synthetic", str(people))
    moved = tmp_path / "moved"
    moved.symlink_to(people)
    done = run_here("-m", "pmm", "evaluate", trained, "--root", moved, "--json", out)
    assert (figures(done, out)["mAP"], figures(done, out)["root"]) == (expected, str(moved))
    assert "data set: synthetic, as the file says" in done.stdout
    assert figures(run_here("-m", "pmm", "evaluate", trained, "--dataset", "synthetic", "--json", out), out)
    done = run_here("-m", "pmm", "evaluate", trained, "--dataset", "market1501")
    assert_one_line_error(done, "--dataset market1501 needs --root", "trained on synthetic", "--root DIR")
    done = run_here("-m", "pmm", "evaluate", trained, "--dataset", "marked1501")
    assert_one_line_error(done, "--dataset is 'marked1501'", "market1501?")
    state = load(trained)
    state["config"]["data"]["dataset"] = "\x1b[31mevil\nmAP 100 %"
    save(tmp_path / "evil.pth", state)
    done = run_here("-m", "pmm", "evaluate", tmp_path / "evil.pth")
    assert_one_line_error(done, r"\x1b[31mevil\nmAP 100 %")
    assert done.stdout == "data set: \\x1b[31mevil\\nmAP 100 %, as the file says\n"
    # an exported file: its checkpoint does, if it is at hand
    done = run_here("-m", "pmm", "evaluate", exported, cwd=tmp_path)
    assert_one_line_error(done, "model.onnx: its checkpoint", "runs/", "--dataset NAME and --root DIR")
    for ending in ("", ".json"):
        shutil.copy(f"{exported}{ending}", tmp_path / f"model.onnx{ending}")
    shutil.copy(trained, tmp_path / "weights")
    done = run_here("-m", "pmm", "evaluate", tmp_path / "model.onnx", "--json", out)
    assert figures(done, out)["mAP"] == pytest.approx(expected, abs=1e-3)
    state = load(trained)
    for root, text in ((str(tmp_path / "gone"), "which is gone; give --root DIR"), ("", "does not say where its data")):
        state["config"]["data"]["root"] = root
        save(tmp_path / "other.pth", state)
        assert_one_line_error(run_here("-m", "pmm", "evaluate", tmp_path / "other.pth"), text)
    done = run_here("-m", "pmm", "evaluate", tmp_path / "other.pth", "--root", people, "--json", out)
    assert (figures(done, out)["mAP"], figures(done, out)["root"]) == (expected, str(people))


def test_a_backend_is_chosen_by_name(trained, exported, people, tmp_path):
    pytest.importorskip("openvino")
    out = tmp_path / "a.json"
    found = {name: figures(evaluate(exported, people, "--backend", name, "--json", out), out) for name in
             ("openvino", "onnxruntime")}  # fmt: skip
    assert {name: each["backend"] for name, each in found.items()} == {"openvino": "openvino", "onnxruntime": "ort-cpu"}
    assert found["openvino"]["mAP"] == pytest.approx(found["onnxruntime"]["mAP"], abs=1e-3)
    done = evaluate(trained, people, "--backend", "openvino")
    assert_one_line_error(done, "best.pth", "a checkpoint", "openvino", "--backend torch or torch-compile")
    done = evaluate(exported, people, "--backend", "ort-cpu", "--device", "cuda")
    assert_one_line_error(done, "ort-cpu ", "--device cuda", "--backend ort-cuda")


def test_every_choice_reaches_the_figures(trained, people, tmp_path, embedded, split):
    out, labels = tmp_path / "a.json", labels_of(split)
    done = evaluate(trained, people, "--metric", "cosine", "--ap", "trapezoid", "--flip-test", "--json", out)
    expected = evaluate_ranking(*embedded[1], *labels, metric="cosine", ap="trapezoid")
    assert figures(done, out)["mAP"] == expected.mAP
    assert "metric cosine, ap trapezoid, flip test" in done.stdout
    done = evaluate(trained, people, "--rerank", "--k1", "7", "--k2", "3", "--rerank-lambda", "0.5", "--json", out)
    chosen = Reranking(k1=7, k2=3, weight=0.5)
    expected = evaluate_distances(reranked(*embedded[0], parameters=chosen), *labels)
    found = figures(done, out)
    assert found["mAP"] == expected.mAP != evaluate_ranking(*embedded[0], *labels).mAP
    assert found["reranking"] == {"k1": 7, "k2": 3, "weight": 0.5}
    assert "re-ranked (k1 7, k2 3, lambda 0.5)" in done.stdout


def test_a_line_per_query(trained, people, tmp_path, embedded, split):
    out = tmp_path / "queries.csv"
    assert evaluate(trained, people, "--per-query", out).returncode == 0
    rows = list(csv.DictReader(out.open()))
    expected = evaluate_ranking(*embedded[0], *labels_of(split))
    assert [row["query"] for row in rows] == [str(sample.path) for sample in split.query]
    np.testing.assert_allclose([float(row["AP"]) for row in rows], expected.per_query_ap, atol=1e-6)
    assert [int(row["first_match_rank"]) for row in rows] == expected.first_rank.tolist()


def test_a_folder_of_crops_without_cameras_says_what_that_means(trained, tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        for number in range(3):
            png(tmp_path / "crops" / name / f"{number}.png", rng)
    of = ("-m", "pmm", "evaluate", trained, "--dataset", "folder", "--root")
    done = run_here(*of, tmp_path / "crops", "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    assert "note: no file name has a camera" in done.stderr
    assert "2 queries, 4 gallery crops" in done.stdout
    assert any(note.startswith("no file name has a camera") for note in figures(done, tmp_path / "a.json")["notes"])
    assert_one_line_error(run_here(*of, tmp_path), f"{tmp_path}: ", f"--root {tmp_path / 'crops'}")
    (tmp_path / "crops" / "b").rename(tmp_path / "b")
    one = tmp_path / "crops"
    assert_one_line_error(run_here(*of, one), f"{one}: ", "are of one identity", "root too high", "pmm check")


def test_what_is_read_is_not_written_to_and_nothing_is_made_for_a_file_that_is_not_there(exported, people, tmp_path):
    for out in (exported, manifest_path(exported)):
        assert_one_line_error(evaluate(exported, people, "--json", out), f"{out}: it is the file to read; give another")
    both = ("--json", tmp_path / "both.csv", "--per-query", tmp_path / "both.csv")
    assert_one_line_error(evaluate(exported, people, *both), "--json and --per-query are both")
    (tmp_path / "link.csv").symlink_to(tmp_path / "both.csv")
    both = ("--json", tmp_path / "both.csv", "--per-query", tmp_path / "link.csv")
    assert_one_line_error(evaluate(exported, people, *both), "--json and --per-query are both")
    (tmp_path / "link.csv").unlink()
    assert_one_line_error(evaluate(tmp_path / "none.pth", people, "--json", tmp_path / "new/o.json"), "does not exist")
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_nan_is_named_with_the_crop(exported, people, split, monkeypatch):
    run = OrtRunner.__call__
    monkeypatch.setattr(OrtRunner, "__call__", lambda self, images: np.full_like(run(self, images), np.nan))
    done = evaluate(exported, people)
    count, first = len(split.query), split.query[0].path
    said = f"{count} of {count} embeddings of query hold NaN or Inf, the first is that of {first};"
    assert_one_line_error(done, said)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_figures_are_not_lost_over_a_name_that_the_terminal_cannot_show(exported, people, tmp_path, encoding):
    root = tmp_path / os.fsdecode("Zürich caf".encode() + b"\xe9")
    root.symlink_to(people)
    of = ("-m", "pmm", "evaluate", exported, "--dataset", "market1501", "--root", root)
    files = ("--json", tmp_path / "a.json", "--per-query", tmp_path / "a.csv")
    done = run_python(*of, *files, PYTHONIOENCODING=encoding)
    assert figures(done, tmp_path / "a.json")["root"] == str(root)
    assert "mAP" in done.stdout
    assert b"caf\xe9/query/" in (tmp_path / "a.csv").read_bytes()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--memory-limit", "much"), "--memory-limit is 'much'"),
        (("--memory-limit", "1kB"), "at least 1MB"),
        (("--rerank", "--memory-limit", "1kB"), "a memory limit of 0.001MB"),
        (("--k1", "3"), "--k1 needs --rerank"),
        (("--rerank", "--k2", "0"), "--k2 is 0"),
        (("--per-query", "a.txt"), "expected a name that ends in .csv"),
        (("--threads", "-1"), "--threads is -1"),
        (("--threads", "100000000"), "--threads is 100000000; expected 0 (the default) to 1024"),
    ],
)
def test_bad_options_are_one_line(trained, people, args, text):
    assert_one_line_error(evaluate(trained, people, *args), text)


def test_a_data_set_without_matches_is_refused_before_a_model_is_loaded(tmp_path):
    rng = np.random.default_rng(0)
    for part, name in (("bounding_box_train", "0001_c1_1"), ("query", "0002_c1_1"), ("bounding_box_test", "0002_c1_2")):
        png(tmp_path / part / f"{name}.png", rng)
    (tmp_path / "no model.pth").write_bytes(b"")
    done = run_here("-m", "pmm", "evaluate", tmp_path / "no model.pth", "--dataset", "market1501", "--root", tmp_path)
    assert_one_line_error(done, "no query has a gallery crop of its identity from another camera")


def test_a_file_that_averages_with_the_mirror_image_already(shared, people):
    path = shared.onnx(ExportOptions(flip_tta=True), verify=False)
    assert_one_line_error(evaluate(path, people, "--flip-test"), "averages with the mirror image already")


@pytest.fixture
def spoiled(people, tmp_path):
    """The people with one query and two gallery crops that cannot be read, and these three."""
    root = shutil.copytree(people, tmp_path / "people")
    query, (first, second) = (
        sorted((root / "query").glob("*.jpg"))[3],
        sorted((root / "bounding_box_test").glob("*.jpg"))[-2:],
    )
    query.write_bytes(query.read_bytes()[:700])
    first.write_bytes(b"")
    second.write_text("no image")
    return root, query, first, second


def test_all_bad_images_of_both_parts_are_named(exported, spoiled):
    root, *bad = spoiled
    names = [path.relative_to(root).as_posix() for path in bad]
    done = evaluate(exported, root)
    assert_one_line_error(done, f"{root}: 3 images cannot be read: ", *names, "--skip-bad-images")
    assert "mAP" not in done.stdout


def test_figures_without_bad_images_say_so_and_are_those_of_the_others(exported, spoiled, tmp_path):
    root, query, *crops = spoiled
    out, per_query = tmp_path / "a.json", tmp_path / "a.csv"
    done = evaluate(exported, root, "--skip-bad-images", "--json", out, "--per-query", per_query)
    found = figures(done, out)
    assert found.pop("unreadable") == {"query": [str(query)], "gallery": [str(path) for path in crops]}
    assert (
        f"{found['queries']} queries, {found['gallery']} gallery crops (without 1 and 2 that cannot be" in done.stdout
    )
    assert all(f"left out {path}: " in done.stderr for path in (query, *crops))
    assert str(query) not in per_query.read_text()
    for path in (query, *crops):
        path.unlink()
    others = figures(evaluate(exported, root, "--json", tmp_path / "b.json"), tmp_path / "b.json")
    assert others.pop("unreadable") == {"query": [], "gallery": []}
    assert others == found


def test_what_is_left_with_bad_images_has_to_be_rankable(exported, people, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    for path in (root / "query").glob("*.jpg"):
        path.write_bytes(b"")
    done = evaluate(exported, root, "--skip-bad-images")
    assert_one_line_error(done, f"{root}: ", "nothing to evaluate", "the first is query/", "it is empty")
    assert "mAP" not in done.stdout


def test_figures_of_a_method_of_our_reading_say_so(trained, exported, people, tmp_path, monkeypatch):
    noted = dataclasses.replace(METHODS["pmm"], note=METHODS["cama"].note)
    monkeypatch.setitem(METHODS, "pmm", noted)
    for artifact in (trained, exported):
        done = evaluate(artifact, people, "--json", tmp_path / "a.json")
        assert figures(done, tmp_path / "a.json")["notes"] == [noted.note]
        assert done.stderr.endswith(f"note: {noted.note}\n")
        assert "our reading" in noted.note


def test_what_else_lies_in_a_data_set_is_told(exported, people, tmp_path):
    root = shutil.copytree(people, tmp_path / "people")
    (root / "query" / "more.zip").write_bytes(b"PK")
    done = evaluate(exported, root, "--json", tmp_path / "a.json")
    said = "left out 1 archive: query/more.zip; unpack it"
    assert f"note: {said}" in done.stderr
    assert said in figures(done, tmp_path / "a.json")["notes"]
