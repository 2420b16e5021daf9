"""Search finds what is there, says nothing else on stdout, and compares nothing that cannot be compared."""

from __future__ import annotations

import dataclasses
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from pmm.export.options import ExportOptions
from pmm.gallery.index import Index
from pmm.gallery.search import search as find
from pmm.utils.errors import InvalidFile
from pmm.visualize.lists import QUERY, RIGHT, UNJUDGED, WRONG
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses


@pytest.fixture(scope="module")
def crops(people):
    return people / "bounding_box_test"


@pytest.fixture(scope="module")
def artifacts(trained, exported, shared):
    """The same checkpoint three ways."""
    return {"torch": trained, "onnx": exported, "cosine": shared.onnx(ExportOptions(normalize=True), verify=False)}


@pytest.fixture(scope="module")
def indices(artifacts, crops, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indices")
    for name in ("onnx", "cosine"):
        done = run_here("-m", "pmm", "embed", artifacts[name], crops, "-o", folder / f"{name}.npz", "--device", "cpu")
        assert done.returncode == 0, done.stderr
    return {name: folder / f"{name}.npz" for name in ("onnx", "cosine")}


@pytest.fixture
def query(crops):
    return sorted(crops.glob("*.jpg"))[17]


def search(index, query, artifact, *more, **env):
    return run_here(
        "-m", "pmm", "search", index, "--query", query, "--artifact", artifact, "--device", "cpu", *more, **env
    )


def rows(done):
    assert done.returncode == 0, done.stderr
    return [tuple(line.split(maxsplit=2)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("name", "own"), [("onnx", "0.0000"), ("cosine", "1.0000")])
def test_a_crop_of_the_gallery_finds_itself_first(indices, artifacts, query, name, own):
    done = search(indices[name], query, artifacts[name])
    found = rows(done)
    warned = done.stderr.splitlines()  # of a file that was made without the parity check
    assert all("pmm search: warning: " in line and "never verified" in line for line in warned), warned
    assert len(warned) == (name == "cosine")
    assert found[0] == ("1", own, query.name)
    assert [int(rank) for rank, _, _ in found] == list(range(1, 11))
    measures = [float(measure) for _, measure, _ in found]
    assert measures == sorted(measures, reverse=name == "cosine")
    assert len({line.index(path) for line, (_, _, path) in zip(done.stdout.splitlines(), found, strict=True)}) == 1
    index = Index.load(indices[name])
    vectors = index.embeddings.astype(np.float64)
    asked = vectors[index.paths.index(query.name)]
    expected = vectors @ asked if name == "cosine" else np.linalg.norm(vectors - asked, axis=1)
    for _, measure, path in found:
        assert float(measure) == pytest.approx(expected[index.paths.index(path)], abs=2e-3)


def test_torch_and_onnx_list_the_same_and_the_difference_is_told(indices, artifacts, query):
    plain, torch = (search(indices["onnx"], query, artifacts[name], "--top", "8") for name in ("onnx", "torch"))
    assert [row[2] for row in rows(plain)] == [row[2] for row in rows(torch)]
    assert torch.stderr.count("\n") == 1, torch.stderr
    assert "pmm search: warning: " in torch.stderr
    assert "best.pth: the index was made by another file of the same checkpoint" in torch.stderr


def test_the_function_finds_what_the_command_lists(indices, artifacts, crops, query, caplog):
    index = Index.load(indices["onnx"])
    listed = [path for _, _, path in rows(search(indices["onnx"], query, artifacts["onnx"], "--top", "4"))]
    found = find(indices["onnx"], query, artifacts["onnx"], top=4, device="cpu")
    assert [index.paths[row] for row in found.indices] == listed
    assert (found.indices.shape, found.distances.dtype) == ((4,), np.float64)
    other = sorted(crops.glob("*.jpg"))[3]
    several = find(index, [str(query), other], str(artifacts["onnx"]), top=4, device="cpu")
    np.testing.assert_array_equal(several.indices[0], found.indices)
    assert index.file(several.indices[1, 0]) == other
    assert not caplog.records
    find(index, [query], artifacts["torch"], top=4, device="cpu")
    assert "best.pth: the index was made by another file of the same checkpoint" in caplog.text
    with refuses(InvalidFile, "does not fit the index", "metric cosine, not euclidean", path=artifacts["torch"]):
        find(indices["cosine"], query, artifacts["torch"], device="cpu")


def test_a_backend_is_chosen_by_name(indices, artifacts, query):
    pytest.importorskip("openvino")
    plain = search(indices["onnx"], query, artifacts["onnx"], "--top", "8")
    other = search(indices["onnx"], query, artifacts["onnx"], "--top", "8", "--backend", "openvino")
    assert [row[2] for row in rows(other)] == [row[2] for row in rows(plain)]
    done = search(indices["onnx"], query, artifacts["torch"], "--backend", "openvino")
    assert_one_line_error(done, "best.pth: it is a checkpoint", "openvino", "--backend torch or torch-compile")


def test_top_beyond_the_gallery_is_all_of_it(indices, artifacts, crops, query):
    found = rows(search(indices["onnx"], query, artifacts["onnx"], "--top", "99999"))
    assert sorted(path for _, _, path in found) == sorted(path.name for path in crops.glob("*.jpg"))


def changed(index, folder, **values):
    before = Index.load(index)
    dataclasses.replace(before, contract=dataclasses.replace(before.contract, **values)).save(folder / "changed.npz")
    return folder / "changed.npz"


def test_another_model_is_refused(indices, artifacts, query, tmp_path):
    done = search(changed(indices["onnx"], tmp_path, checkpoint_sha256="f" * 64), query, artifacts["onnx"])
    assert_one_line_error(done, "model.onnx: it does not fit", "not comparable", "checkpoint ffffffffffff..., not ")
    assert not done.stdout
    done = search(indices["cosine"], query, artifacts["onnx"], "--picture", tmp_path / "a.png")
    assert_one_line_error(
        done, "the index has normalised True, not False; metric cosine, not euclidean", "embed the folder"
    )
    assert not (tmp_path / "a.png").exists()


def test_another_precision_is_told(indices, artifacts, query, tmp_path):
    done = search(changed(indices["onnx"], tmp_path, precision="fp16"), query, artifacts["onnx"], "--top", "1")
    assert rows(done)[0][2] == query.name
    assert "model.onnx: the index was made in fp16, the query in fp32" in done.stderr


def test_the_picture_shows_the_list_without_verdicts(indices, artifacts, query, crops, tmp_path):
    out = tmp_path / "list.png"
    done = search(indices["onnx"], query, artifacts["onnx"], "--top", "4", "--picture", out)
    assert len(rows(done)) == 4
    with Image.open(out) as image:
        assert image.mode == "RGB"
        seen, width = {colour for _, colour in image.getcolors(1 << 24)}, image.width
    assert QUERY in seen
    assert UNJUDGED in seen
    assert not {RIGHT, WRONG} & seen, "nobody told it who is who"
    wide = search(indices["onnx"], query, artifacts["onnx"], "--top", "25", "--picture", out)
    assert len(rows(wide)) == 25
    assert "list.png shows the first 20" in wide.stderr
    assert Image.open(out).width > 3 * width
    assert os.listdir(tmp_path) == ["list.png"]


def test_missing_crops_are_one_line_and_a_moved_folder_can_be_named(indices, artifacts, crops, query, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(crops, moved)
    before = Index.load(indices["onnx"])
    index = tmp_path / "index.npz"
    dataclasses.replace(before, folder=str(tmp_path / "gone")).save(index)
    out = tmp_path / "a.png"
    done = search(index, query, artifacts["onnx"], "--picture", out)
    assert_one_line_error(done, "10 of the 10 crops", str(tmp_path / "gone" / query.name), "--folder DIR")
    assert not done.stdout
    assert not out.exists()
    assert len(rows(search(index, query, artifacts["onnx"]))) == 10  # no picture, no need for them
    assert len(rows(search(index, query, artifacts["onnx"], "--picture", out, "--folder", moved))) == 10
    assert out.exists()


def test_wrong_use_is_one_line(indices, artifacts, query, tmp_path):
    index, artifact = indices["onnx"], artifacts["onnx"]
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    assert_one_line_error(search(index, empty, artifact), "empty.jpg: not a readable image")
    assert_one_line_error(search(index, tmp_path / "none.jpg", artifact), "none.jpg: it does not exist")
    assert_one_line_error(search(index, query, artifact, "--top", "0"), "--top is 0")
    assert_one_line_error(search(index, query, artifact, "--picture", tmp_path / "a.jpg"), "ends in .png")
    assert_one_line_error(
        search(tmp_path / "none.npz", query, artifact), "none.npz: it does not exist; expected an index"
    )
    assert_one_line_error(search(artifact, query, artifact), "model.onnx: it is an ONNX file", "pmm embed")
    own = tmp_path / "query.png"
    Image.open(query).save(own)
    content = own.read_bytes()
    assert_one_line_error(search(index, own, artifact, "--picture", own), "is the file to read")
    assert own.read_bytes() == content


def test_odd_names_stay_on_one_line(indices, artifacts, query, tmp_path):
    before = Index.load(indices["onnx"])
    paths = tuple("line\nbreak\x1b[31m.jpg" if path == query.name else path for path in before.paths)
    dataclasses.replace(before, paths=paths).save(tmp_path / "odd.npz")
    found = rows(search(tmp_path / "odd.npz", query, artifacts["onnx"], "--top", "3"))
    assert found[0] == ("1", "0.0000", r"line\nbreak\x1b[31m.jpg")
    assert len(found) == 3
