"""Search finds what is there, says nothing else on stdout, and compares nothing that cannot be compared."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from pmm.export.options import ExportOptions
from pmm.gallery.embed_folder import embed as embed_folder
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.gallery.search import search as find
from pmm.gallery.storage.manifest import read_gallery_manifest
from pmm.gallery.storage.thresholds import Threshold
from pmm.gallery.unfinished import JOB_FILE
from pmm.utils.errors import InvalidFile, InvalidInput
from pmm.visualize.lists import QUERY, RIGHT, UNJUDGED, WRONG
from tests.conftest import assert_one_line_error, run_here
from tests.gallery.old_index import index_members, npy, write_index
from tests.refusals import refuses


@pytest.fixture(scope="module")
def crops(people):
    return people / "bounding_box_test"


@pytest.fixture(scope="module")
def artifacts(trained, exported, shared):
    """The same checkpoint three ways."""
    return {"torch": trained, "onnx": exported, "cosine": shared.onnx(ExportOptions(normalize=True), verify=False)}


@pytest.fixture(scope="module")
def galleries(artifacts, crops, tmp_path_factory):
    folder = tmp_path_factory.mktemp("galleries")
    return {
        name: embed_folder(artifacts[name], crops, folder / name, names="market1501", device="cpu").path
        for name in ("onnx", "cosine")
    }


@pytest.fixture
def query(crops):
    return sorted(crops.glob("*.jpg"))[17]


@pytest.fixture
def changeable(galleries, tmp_path):
    """A copy of the gallery, for a test to change what its manifest says."""
    shutil.copytree(galleries["onnx"], tmp_path / "copy")

    def change(**values):
        dataclasses.replace(read_gallery_manifest(tmp_path / "copy"), **values).write(tmp_path / "copy")
        return tmp_path / "copy"

    return change


def search(gallery, query, *more, **env):
    return run_here("-m", "pmm", "search", gallery, "--query", query, "--device", "cpu", *more, **env)


def rows(done):
    """Of the table: header -> cell, a line each; a cell holds one blank at most."""
    assert done.returncode == 0, done.stderr
    head, *lines = ([cell for cell in line.split("  ") if cell] for line in done.stdout.splitlines())
    return [dict(zip([name.strip() for name in head], map(str.strip, line), strict=True)) for line in lines]


def ids(done):
    return [row["id"] for row in rows(done)]


def found_as_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["onnx", "cosine"])
def test_a_crop_of_the_gallery_finds_itself_first(galleries, query, name):
    done = search(galleries[name], query)
    found = rows(done)
    warned = done.stderr.splitlines()  # of a file that was made without the parity check
    assert all("pmm search: warning: " in line and "never verified" in line for line in warned), warned
    assert len(warned) == (name == "cosine")
    assert (found[0]["distance"], found[0]["id"]) == ("0.0000", query.name)
    assert [int(row["rank"]) for row in found] == list(range(1, 11))
    distances = [float(row["distance"]) for row in found]
    assert distances == sorted(distances)
    assert len({line.index(row["id"]) for line, row in zip(done.stdout.splitlines()[1:], found, strict=True)}) == 1
    gallery = Gallery.open(galleries[name])
    vectors, names = gallery.embeddings().astype(np.float64), gallery.column("id").tolist()
    asked = vectors[names.index(query.name)]
    expected = 1 - vectors @ asked if name == "cosine" else np.linalg.norm(vectors - asked, axis=1)
    for row in found:
        assert float(row["distance"]) == pytest.approx(expected[names.index(row["id"])], abs=2e-3)
        assert f"_c{row['camera']}s" in row["id"]


def test_torch_and_onnx_list_the_same_and_the_difference_is_told(galleries, artifacts, query):
    plain = search(galleries["onnx"], query, "--top", "8")
    torch = search(galleries["onnx"], query, "--top", "8", "--model", artifacts["torch"])
    assert ids(plain) == ids(torch)
    assert torch.stderr.count("\n") == 1, torch.stderr
    assert "pmm search: warning: " in torch.stderr
    assert "best.pth: the gallery was made by another file of the same checkpoint" in torch.stderr


def test_the_function_finds_what_the_command_lists(galleries, artifacts, crops, query, tmp_path, caplog):
    listed = ids(search(galleries["onnx"], query, "--top", "4"))
    found = find(galleries["onnx"], query, k=4, device="cpu")
    assert found.ids.tolist() == listed
    assert (found.ids.shape, found.distances.dtype) == ((4,), np.float64)
    other = sorted(crops.glob("*.jpg"))[3]
    several = find(Gallery.open(galleries["onnx"]), [str(query), other], str(artifacts["onnx"]), k=4, device="cpu")
    assert several.ids[0].tolist() == listed
    assert several.ids[1, 0] == other.name
    shutil.copytree(crops, tmp_path / "asked", ignore=lambda _, names: {*names} - {query.name, other.name})
    folder = find(galleries["onnx"], tmp_path / "asked", k=4, device="cpu")
    assert folder.ids.tolist() == several.ids[::-1].tolist()
    assert not caplog.records
    find(galleries["onnx"], [query], artifacts["torch"], k=4, device="cpu")
    assert "best.pth: the gallery was made by another file of the same checkpoint" in caplog.text
    with refuses(InvalidFile, "does not fit the gallery", "metric cosine, not euclidean", path=artifacts["torch"]):
        find(galleries["cosine"], query, artifacts["torch"], device="cpu")
    night = RowFilter(cameras=["1"])
    assert all("_c1s" in name for name in find(galleries["onnx"], query, k=5, where=night, device="cpu").ids)
    with refuses(InvalidInput, "camera 77"):
        find(galleries["onnx"], query, where=RowFilter(cameras=["77"]), device="cpu")


def test_the_function_names_all_bad_images(galleries, query, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(query.read_bytes()[:400])
    shutil.copy(query, tmp_path / "good.jpg")
    with refuses(InvalidFile, "2 images", "a.jpg", "b.jpg", path=tmp_path):
        find(galleries["onnx"], tmp_path, device="cpu")
    with refuses(InvalidFile, path=tmp_path / "a.jpg"):
        find(galleries["onnx"], [query, tmp_path / "a.jpg"], device="cpu")


def test_a_backend_is_chosen_by_name(galleries, artifacts, query):
    pytest.importorskip("openvino")
    plain = search(galleries["onnx"], query, "--top", "8")
    other = search(galleries["onnx"], query, "--top", "8", "--backend", "openvino")
    assert ids(other) == ids(plain)
    done = search(galleries["onnx"], query, "--model", artifacts["torch"], "--backend", "openvino")
    assert_one_line_error(done, "best.pth: it is a checkpoint", "openvino", "--backend torch or torch-compile")


def test_top_beyond_the_gallery_is_all_of_it_and_said(galleries, crops, query):
    done = search(galleries["onnx"], query, "--top", "99999")
    names = sorted(path.name for path in crops.glob("*.jpg"))
    assert sorted(ids(done)) == names
    assert done.stderr.splitlines() == [
        f"pmm search: note: there are {len(names)} crops to look at, and all are listed"
    ]


def test_filters_keep_what_they_say(galleries, query):
    gallery = galleries["onnx"]
    everything = found_as_json(search(gallery, query, "--top", "9999", "--json"))["queries"][0]["found"]

    def kept(*flags):
        done = search(gallery, query, "--top", "9999", "--json", *flags)
        return [crop["id"] for crop in found_as_json(done)["queries"][0]["found"]]

    def of(keep):
        return [crop["id"] for crop in everything if keep(crop)]

    times = sorted(crop["time"] for crop in everything)
    first, last = times[len(times) // 4], times[len(times) // 2]
    assert kept("--camera", "1", "3") == of(lambda crop: crop["camera"] in ("1", "3"))
    assert kept("--time-from", str(first), "--time-to", str(last)) == of(lambda crop: first <= crop["time"] <= last)
    pid = everything[5]["pid"]
    assert kept("--where", f"pid={pid:04d}", f"pid={everything[0]['pid']}", "--camera", "1") == of(
        lambda crop: crop["pid"] in (pid, everything[0]["pid"]) and crop["camera"] == "1"
    )
    assert kept("--where", f"id={query.name}") == [query.name]
    own = query.name.split("_c")[1][0]
    others = of(lambda crop: crop["camera"] != own)
    assert (
        kept("--not-same-camera", "--names", "market1501") == kept("--not-same-camera", "--query-camera", own) == others
    )


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--camera", "77"], ["none of the", "camera 77"]),
        (["--where", "pid"], ["--where is 'pid'", "NAME=VALUE"]),
        (["--where", "floor=3"], ["floor=3", "pid"]),
        (["--where", "pid=x"], ["--where is 'x'", "whole number"]),
        (["--where", "time=3"], ["--time-from"]),
        (["--time-from", "noon"], ["--time-from is 'noon'", "seconds"]),
        (["--top", "0"], ["--top is 0"]),
        (["--threshold", "near"], ["--threshold is 'near'", "auto"]),
        (["--threshold", "-1"], ["--threshold is '-1'", "0 or more"]),
        (["--threshold", "auto"], ["has no threshold", "--threshold T"]),
        (["--threshold", "3", "--fmr", "1e-3"], ["--fmr", "--threshold", "auto"]),
        (["--json", "--csv"], ["--json", "--csv"]),
        (["--not-same-camera"], ["--not-same-camera", "--query-camera"]),
        (["--not-same-camera", "--query-camera", "1", "--names", "market1501"], ["--query-camera", "--names"]),
        (["--not-same-camera", "--names", "(?P<day>.)"], ["--names", "group camera"]),
        (["--query-camera", "1"], ["--query-camera", "--not-same-camera"]),
        (["--names", "market1501"], ["--names", "--not-same-camera"]),
        (["--camera", "1", "--not-same-camera", "--query-camera", "1"], ["camera 1", "the query's own"]),
        (["--folder", "crops"], ["--folder", "--picture"]),
        (["--model", "none.onnx"], ["none.onnx: it does not exist"]),
        (["--picture", "a.jpg"], ["ends in .png"]),
    ],
)
def test_wrong_flags_are_one_line_before_a_model_is_loaded(galleries, query, monkeypatch, flags, facts):
    monkeypatch.setattr("pmm.gallery.search.open_runner", lambda *_, **__: pytest.fail("a model was opened"))
    assert_one_line_error(search(galleries["onnx"], query, *flags), *facts)


def test_a_query_that_is_none_is_one_line(galleries, query, tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    assert_one_line_error(search(galleries["onnx"], empty), "empty.jpg: not a readable image")
    assert_one_line_error(search(galleries["onnx"], tmp_path / "none.jpg"), "none.jpg: it does not exist")
    assert_one_line_error(search(galleries["onnx"], tmp_path), "1 image cannot be read: empty.jpg", "replace or remove")
    own = tmp_path / "query.png"
    Image.open(query).save(own)
    content = own.read_bytes()
    assert_one_line_error(search(galleries["onnx"], own, "--picture", own), "is the file to read")
    assert own.read_bytes() == content


def test_what_is_no_gallery_is_one_line(galleries, artifacts, query, tmp_path):
    assert_one_line_error(search(tmp_path / "none", query), "none: it does not exist; expected a gallery")
    assert_one_line_error(search(artifacts["onnx"], query), "model.onnx: it is an ONNX file", "pmm embed")
    assert_one_line_error(search(tmp_path, query), "it holds no manifest.json")
    source = Gallery.open(galleries["onnx"]).source
    Gallery.create(tmp_path / "empty", np.zeros((0, source.embedding.dim)), [], source=source)
    assert_one_line_error(search(tmp_path / "empty", query), "empty: it holds no crops", "pmm embed --append")


def test_another_model_is_refused(galleries, artifacts, query, changeable, tmp_path, monkeypatch):
    source = Gallery.open(galleries["onnx"]).source
    done = search(galleries["cosine"], query, "--model", artifacts["onnx"], "--picture", tmp_path / "a.png")
    assert_one_line_error(done, "the gallery has normalised True, not False; metric cosine, not euclidean")
    assert not (tmp_path / "a.png").exists()
    monkeypatch.setattr("pmm.gallery.search.open_runner", lambda *_, **__: pytest.fail("a model was opened"))
    other = dataclasses.replace(source, checkpoint_sha256="f" * 64, artifact_sha256="f" * 64)
    for model in ("onnx", "torch"):
        done = search(changeable(source=other), query, "--model", artifacts[model])
        assert_one_line_error(done, f"{artifacts[model]}: it does not fit", "checkpoint ffffffffffff..., not ")
        assert not done.stdout


def test_a_model_that_is_gone_or_changed_is_one_line_that_says_what_to_give(
    changeable, galleries, artifacts, query, tmp_path
):
    source = Gallery.open(galleries["onnx"]).source
    for place, content, fact in (
        (tmp_path / "gone.onnx", None, "gone.onnx, is gone"),
        (tmp_path / "new.onnx", b"x", "new.onnx, has changed since"),
        ("", None, "does not say where its model is"),
    ):
        if content:
            place.write_bytes(content)
        moved = changeable(source=dataclasses.replace(source, artifact=str(place)))
        assert_one_line_error(search(moved, query), fact, "--model FILE")
        assert ids(search(moved, query, "--model", artifacts["onnx"], "--top", "1")) == [query.name]
    done = search(changeable(source=None), query, "--model", artifacts["onnx"])
    assert_one_line_error(done, "does not say what made its embeddings", "pmm.Gallery.open")


def test_another_precision_is_told(changeable, galleries, query):
    source = Gallery.open(galleries["onnx"]).source
    done = search(changeable(source=dataclasses.replace(source, precision="fp16")), query, "--top", "1")
    assert ids(done) == [query.name]
    assert "model.onnx: the gallery was made in fp16, the query in fp32" in done.stderr


def test_a_gallery_that_is_not_finished_is_told(changeable, query):
    (changeable() / JOB_FILE).write_text("{}")
    done = search(changeable(), query, "--top", "1")
    assert ids(done) == [query.name]
    assert "pmm embed has not finished it" in done.stderr


def threshold(fmr, distance, checkpoint, precision="fp32"):
    return Threshold(
        fmr=fmr, distance=distance, kind="bench", precision=precision, stored="fp32", checkpoint_sha256=checkpoint
    )


def test_matches_are_what_lies_within_the_threshold(galleries, changeable, query):
    everything = found_as_json(search(galleries["onnx"], query, "--top", "30", "--json"))["queries"][0]["found"]
    assert all("match" not in crop for crop in everything)
    limit, checkpoint = everything[6]["distance"], Gallery.open(galleries["onnx"]).source.checkpoint_sha256
    by_hand = found_as_json(search(galleries["onnx"], query, "--top", "30", "--json", "--threshold", repr(limit)))
    assert [crop["match"] for crop in by_hand["queries"][0]["found"]] == [True] * 7 + [False] * 23
    assert "threshold_of" not in by_hand
    two = changeable(thresholds=(threshold(1e-2, 99.0, checkpoint), threshold(1e-3, limit, checkpoint)))
    done = search(two, query, "--top", "30", "--threshold", "auto", "--fmr", "1e-3")
    assert [row["match"] for row in rows(done)] == ["match"] * 7 + ["no match"] * 23
    facts = found_as_json(search(two, query, "--threshold", "auto", "--fmr", "0.01", "--json"))
    assert facts["threshold_of"]["fmr"] == 0.01
    assert facts["threshold"] == 99.0
    assert_one_line_error(search(two, query, "--threshold", "auto"), "0.001, 0.01", "--fmr")
    assert_one_line_error(search(two, query, "--threshold", "auto", "--fmr", "0.5"), "--fmr is 0.5", "0.001 or 0.01")
    one = changeable(thresholds=(threshold(1e-3, limit, checkpoint, "int8"),))
    assert_one_line_error(search(one, query, "--threshold", "auto"), "int8", "fp32")


def test_a_folder_of_queries_is_a_table_each(galleries, crops, tmp_path):
    names = [path.name for path in sorted(crops.glob("*.jpg"))[3:6]]
    (tmp_path / "asked" / "b").mkdir(parents=True)
    for place, name in zip(("", "b", "b"), names, strict=True):
        shutil.copy(crops / name, tmp_path / "asked" / place / name)
    done = search(galleries["onnx"], tmp_path / "asked", "--top", "3", "--threshold", "0")
    assert done.returncode == 0, done.stderr
    tables = [table.splitlines() for table in done.stdout.split("\n\n")]
    expected = sorted([names[0], f"b/{names[1]}", f"b/{names[2]}"])
    assert [table[0] for table in tables] == [f"{name} (1 within the threshold)" for name in expected]
    assert [table[2].split()[-1] for table in tables] == [name.split("/")[-1] for name in expected]
    assert {len(table) for table in tables} == {5}
    facts = found_as_json(search(galleries["onnx"], tmp_path / "asked", "--top", "3", "--json"))
    assert [each["query"] for each in facts["queries"]] == expected
    printed = search(galleries["onnx"], tmp_path / "asked", "--top", "3", "--csv").stdout
    lines = list(csv.DictReader(io.StringIO(printed)))
    plain = [(each["query"], crop) for each in facts["queries"] for crop in each["found"]]
    assert len(lines) == len(plain) == 9
    for line, (name, crop) in zip(lines, plain, strict=True):
        assert (line["query"], int(line["rank"]), line["match"]) == (name, crop["rank"], "")
        assert {key: line[key] for key in ("id", "camera", "path")} == {
            key: crop[key] for key in ("id", "camera", "path")
        }
        assert float(line["distance"]) == crop["distance"]
    assert not {"file_size", "file_modified_ns"} & set(lines[0])


def test_bad_queries_are_left_out_if_that_is_wanted(galleries, crops, tmp_path):
    empty, damaged, good = (tmp_path / "asked" / f"{place}_c1s1.jpg" for place in range(3))
    good.parent.mkdir()
    shutil.copy(min(crops.glob("*_c2s*.jpg")), good)
    empty.write_bytes(b"")
    flags = ("--top", "1", "--not-same-camera", "--names", r"_c(?P<camera>\d)", "--json", "--batch-size", "1")
    damaged.write_bytes(good.read_bytes()[:700])
    assert_one_line_error(search(galleries["onnx"], good.parent, *flags), "2 images cannot be read: 0_c1s1", "1_c1s1")
    done = search(galleries["onnx"], good.parent, "--skip-bad-images", "--threads", "1", *flags)
    assert [each["query"] for each in found_as_json(done)["queries"]] == [good.name]
    assert [f"left out {path}: " in done.stderr for path in (empty, damaged)] == [True, True]
    empty.unlink()
    assert_one_line_error(search(galleries["onnx"], good.parent, *flags), "1_c1s1.jpg", "--skip-bad-images")
    good.unlink()
    damaged.rename(empty)
    done = search(galleries["onnx"], good.parent, "--skip-bad-images", *flags)
    assert_one_line_error(done, "none of its 1 images can be read")


def test_own_cameras_count_in_the_note(galleries, crops, tmp_path):
    gallery = Gallery.open(galleries["onnx"])
    others = int((gallery.column("camera") != "1").sum())
    shutil.copy(min(crops.glob("*.jpg")), tmp_path / "a_c1.jpg")
    top, names = ("--top", str(others + 1)), ("--not-same-camera", "--names", r"_c(?P<camera>\d+)")
    done = search(galleries["onnx"], tmp_path / "a_c1.jpg", *top, *names)
    assert f"note: there are {others} crops to look at, and all" in done.stderr
    assert "no crop is of camera" not in done.stderr
    done = search(galleries["onnx"], tmp_path / "a_c1.jpg", "--not-same-camera", "--query-camera", "c1")
    assert "no crop is of camera c1, so none is left out for it; there are 1, 2, 3" in done.stderr
    done = search(galleries["onnx"], tmp_path / "a_c1.jpg", "--where", f"id={gallery.column('id')[0]}")
    assert "note: there is 1 crop to look at" in done.stderr


def test_the_picture_shows_the_list_without_verdicts(galleries, query, tmp_path):
    out = tmp_path / "list.png"
    done = search(galleries["onnx"], query, "--top", "4", "--picture", out)
    assert len(rows(done)) == 4
    with Image.open(out) as image:
        assert image.mode == "RGB"
        seen, width = {colour for _, colour in image.getcolors(1 << 24)}, image.width
    assert QUERY in seen
    assert UNJUDGED in seen
    assert not {RIGHT, WRONG} & seen, "nobody told it who is who"
    wide = search(galleries["onnx"], query, "--top", "25", "--picture", out)
    assert len(rows(wide)) == 25
    assert "list.png shows the first 20" in wide.stderr
    assert Image.open(out).width > 3 * width
    assert os.listdir(tmp_path) == ["list.png"]


def test_missing_crops_are_one_line_and_a_moved_folder_can_be_named(changeable, crops, query, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(crops, moved)
    gallery = changeable(folder=str(tmp_path / "gone"))
    out = tmp_path / "a.png"
    done = search(gallery, query, "--picture", out)
    assert_one_line_error(done, "10 of the 10 crops", str(tmp_path / "gone" / query.name), "--folder FOLDER")
    assert done.stdout == search(gallery, query).stdout
    assert not out.exists()
    assert len(rows(search(gallery, query))) == 10  # no picture, no need for them
    assert len(rows(search(gallery, query, "--picture", out, "--folder", moved))) == 10
    assert out.exists()


def test_an_index_of_an_earlier_version_is_searched_and_becomes_a_gallery(galleries, artifacts, crops, query, tmp_path):
    gallery = Gallery.open(galleries["onnx"])
    header = {"format": "pmm-index-1", "folder": gallery.folder, **dataclasses.asdict(gallery.source)}
    del header["artifact"]
    members = index_members(gallery.embeddings(), tuple(gallery.column("path")))
    members["contract.npy"] = npy(np.array(json.dumps(header)))
    index = write_index(tmp_path / "old.npz", members)
    listed = ids(search(galleries["onnx"], query, "--top", "5"))
    assert_one_line_error(search(index, query), "old.npz: it does not say where its model is", "--model FILE")
    assert_one_line_error(search(index, query, "--camera", "1"), "--camera is '1'", "old.npz has id, path")
    done = search(index, query, "--model", artifacts["onnx"], "--top", "5", "--picture", tmp_path / "a.png")
    assert ids(done) == listed
    assert find(index, query, artifacts["onnx"], k=5, device="cpu").ids.tolist() == listed
    done = run_here("-m", "pmm", "gallery", "import", index, "-o", tmp_path / "new")
    assert f"{len(gallery)} crops, 384 dimensions, euclidean" in done.stdout, done.stderr
    assert ids(search(tmp_path / "new", query, "--model", artifacts["onnx"], "--top", "5")) == listed
    assert_one_line_error(run_here("-m", "pmm", "gallery", "import", index, "-o", crops), f"{crops}: it holds")
    done = run_here("-m", "pmm", "gallery", "import", artifacts["onnx"], "-o", tmp_path / "none")
    assert_one_line_error(done, "model.onnx: it is an ONNX file")
    assert not (tmp_path / "none").exists()


def test_odd_names_stay_on_one_line(galleries, query, tmp_path):
    before = Gallery.open(galleries["onnx"])
    names = ["line\nbreak\x1b[31m.jpg" if path == query.name else path for path in before.column("id")]
    Gallery.create(tmp_path / "odd", before.embeddings(), names, source=before.source)
    found = rows(search(tmp_path / "odd", query, "--top", "3"))
    assert (found[0]["distance"], found[0]["id"]) == ("0.0000", r"line\nbreak\x1b[31m.jpg")
    assert len(found) == 3
