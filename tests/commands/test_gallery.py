"""pmm gallery: what its commands do and say, and what they refuse in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pmm.gallery.embed_folder import embed
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.manifest import read_gallery_manifest
from tests.conftest import assert_one_line_error, run_here


def run(name, *args):
    return run_here("-m", "pmm", "gallery", name, *args)


def said(name, *args):
    done = run(name, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def gallery(tmp_path):
    """Ten crops of two cameras, a second apart."""
    rng = np.random.default_rng(0)
    columns = {"camera": ["1", "2"] * 5, "time": np.arange(10.0), "floor": np.arange(10) // 5}
    ids = [f"{row}.jpg" for row in range(10)]
    Gallery.create(tmp_path / "g", rng.normal(size=(10, 4)), ids, columns=columns)
    return tmp_path / "g"


def ids_of(path):
    return Gallery.open(path).column("id").tolist()


def test_info_is_text_or_json(gallery):
    text = said("info", gallery)
    assert text.startswith("gallery:\n")
    assert "columns.time" in text
    facts = json.loads(said("info", gallery, "--json"))["gallery"]
    assert (facts["name"], facts["crops"], facts["dimensions"], facts["made_by"]) == ("g", 10, 4, None)
    assert_one_line_error(run("info", gallery / "none"), "none: it does not exist", "a gallery")


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (["0.jpg", "7.jpg"], [1, 2, 3, 4, 5, 6, 8, 9]),
        (["--camera", "1"], [1, 3, 5, 7, 9]),
        (["--time-to", "7"], [8, 9]),
        (["--time-from", "1970-01-01T00:00:03Z", "--where", "floor=0"], [0, 1, 2, 5, 6, 7, 8, 9]),
    ],
)
def test_crops_are_removed_by_id_or_by_filter(gallery, flags, left):
    count = 10 - len(left)
    assert f"{count} crops of 10 would be removed" in said("remove", gallery, *flags, "--dry-run")
    assert len(ids_of(gallery)) == 10
    assert f"{count} crops removed, {len(left)} left" in said("remove", gallery, *flags)
    assert ids_of(gallery) == [f"{row}.jpg" for row in left]


def test_ids_to_remove_come_from_a_file_too(gallery, tmp_path):
    (tmp_path / "ids.txt").write_text("3.jpg\n\n4.jpg\n")
    said("remove", gallery, "5.jpg", "--ids", tmp_path / "ids.txt")
    assert ids_of(gallery) == [f"{row}.jpg" for row in (0, 1, 2, 6, 7, 8, 9)]


def test_odd_ids_are_those_of_the_file_and_counted_once(tmp_path):
    names = ["-dash.jpg", "one\u2028line.jpg", "first.jpg", "kept.jpg"]
    gallery = Gallery.create(tmp_path / "g", np.eye(4), names).path
    assert_one_line_error(run("remove", gallery, "-dash.jpg"), "unknown flag -dash.jpg", "write -- before")
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbffirst.jpg\r\n" + names[1].encode() + b"\n")
    flags = ("--ids", tmp_path / "ids.txt", "--", names[0], names[0])
    assert "3 crops of 4 would be removed" in said("remove", gallery, "--dry-run", *flags)
    assert "3 crops removed, 1 left" in said("remove", gallery, *flags)
    np.save(tmp_path / "a.npy", np.eye(4)[:2])
    said("add", gallery, tmp_path / "a.npy", "--ids", tmp_path / "ids.txt")
    assert ids_of(gallery) == ["kept.jpg", "first.jpg", names[1]]


def test_a_gallery_that_is_being_changed_is_waited_for(gallery):
    with Gallery.open(gallery).writer():
        done = run("remove", gallery, "0.jpg")
    assert_one_line_error(done, "in use by another process", "wait until")
    assert "another folder" not in done.stderr


def test_whole_numbers_are_ids_too(tmp_path):
    Gallery.create(tmp_path / "g", np.eye(4), [3, 1, -4, 7])
    said("remove", tmp_path / "g", "--where", "id=7")
    assert_one_line_error(run("remove", tmp_path / "g", "1", "x", "9"), "does not hold 2 of 3 ids: x, 9")
    (tmp_path / "ids.txt").write_text("-4\n")
    said("remove", tmp_path / "g", "1", "--ids", tmp_path / "ids.txt")
    assert ids_of(tmp_path / "g") == [3]


def test_a_wrong_removal_removes_nothing(gallery, tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe")
    for flags, facts in (
        (["0.jpg", "none.jpg"], ["does not hold 1 of 2 ids: none.jpg", "nothing was removed"]),
        (["--camera", "9"], ["camera 9"]),
        (["--where", "colour=red"], ["colour=red", "floor"]),
        ([], ["--ids", "--camera"]),
        (["0.jpg", "--camera", "1"], ["cannot be combined"]),
        (["--ids", tmp_path / "gone.txt"], ["gone.txt: it does not exist"]),
        (["--ids", tmp_path / "ids.txt"], ["no UTF-8"]),
    ):
        assert_one_line_error(run("remove", gallery, *flags), *facts)
    assert len(ids_of(gallery)) == 10


def test_compact_frees_what_was_removed(gallery):
    said("remove", gallery, "--camera", "1")
    text = said("compact", gallery)
    assert "5 crops, 5 removed ones gone; 1 chunk (of 1)" in text
    assert read_gallery_manifest(gallery).stored_rows == 5
    assert_one_line_error(run("compact", gallery / "none"), "none: it does not exist")


def test_verify_tells_what_has_changed(gallery):
    assert "10 crops, all files are as they were written" in said("verify", gallery)
    file = next(gallery.glob("chunks/*/embeddings.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = run("verify", gallery)
    assert (done.returncode, done.stderr) == (1, "")
    assert str(file) in done.stdout.splitlines()[0]
    file.write_bytes(content[:-1])
    assert_one_line_error(run("verify", gallery), str(file), "bytes")


def test_embeddings_of_another_program_make_a_gallery_and_are_added(tmp_path):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(3, 4))
    np.savez(tmp_path / "a.npz", embeddings=first, ids=np.arange(6), camera=np.array(["a", "b"] * 3))
    text = said("add", tmp_path / "g", tmp_path / "a.npz", "--metric", "cosine", "--store", "fp16")
    assert "6 crops added; 6 crops, 4 dimensions, cosine, stored in fp16" in text
    np.savez_compressed(tmp_path / "b.npz", embeddings=second, ids=np.arange(6, 9), camera=np.array(["c"] * 3))
    assert "3 crops added; 9 crops" in said("add", tmp_path / "g", tmp_path / "b.npz")
    gallery = Gallery.open(tmp_path / "g")
    assert (gallery.metric, gallery.precision, gallery.source) == ("cosine", "fp16", None)
    assert gallery.column("camera").tolist() == ["a", "b", "a", "b", "a", "b", "c", "c", "c"]
    ids, distances = gallery.search(second[1], k=1)
    assert ids.tolist() == [7]
    assert distances[0] < 1e-5


def test_ids_of_a_plain_array_come_from_a_file(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3))
    (tmp_path / "ids.txt").write_text("x\ny\nz\n")
    said("add", tmp_path / "g", tmp_path / "a.npy", "--ids", tmp_path / "ids.txt", "--metric", "euclidean")
    np.save(tmp_path / "ids.npy", np.array(["p", "q", "r"]))
    said("add", tmp_path / "g", tmp_path / "a.npy", "--ids", tmp_path / "ids.npy")
    assert ids_of(tmp_path / "g") == ["x", "y", "z", "p", "q", "r"]


def test_embeddings_that_cannot_be_added_are_one_line(gallery, tmp_path):
    def saved(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    np.save(tmp_path / "a.npy", np.eye(4))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "two.txt").write_text("x\ny\n")
    eye, names = np.eye(4), np.array(list("abcd"))
    columns = {"camera": names, "time": np.zeros(4), "floor": np.zeros(4, int)}
    for file, flags, facts in (
        (tmp_path / "none.npz", [], ["none.npz: it does not exist"]),
        (tmp_path / "text.npz", [], ["text.npz: it cannot be read"]),
        (tmp_path / "text.npy", [], ["text.npy: it cannot be read (it holds Python objects, or is no array)"]),
        (tmp_path / "objects.npy", [], ["objects.npy: it cannot be read"]),
        (tmp_path / "a.npy", [], ["it holds no ids", "--ids FILE"]),
        (tmp_path / "a.npy", ["--ids", tmp_path / "two.txt"], ["two.txt: ids are [2] for 4 embeddings"]),
        (saved("b.npz", vectors=eye), [], ["it holds vectors", "embeddings [N, D]"]),
        (saved("c.npz", embeddings=eye, ids=names), ["--ids", tmp_path / "two.txt"], ["holds ids itself"]),
        (saved("d.npz", embeddings=eye[0], ids=names), [], ["float64 [4]", "numbers [N, D]"]),
        (saved("e.npz", embeddings=eye, ids=names, camera=names[:2]), [], ["camera are [2] for 4 embeddings"]),
        (saved("f.npz", contract="{}", embeddings=eye, paths=names), [], ["earlier version", "pmm gallery import"]),
        (saved("g.npz", embeddings=eye, ids=names), [], ["g.npz: columns are none", "camera, time", "nothing"]),
        (saved("h.npz", embeddings=eye[:, :3], ids=names, **columns), [], ["[4, 3]", "[4, 4]"]),
        (saved("i.npz", embeddings=eye * np.nan, ids=names, **columns), [], ["NaN", "a, b, c"]),
        (saved("j.npz", embeddings=eye[:2], ids=np.array(["x", "1.jpg"]), **{k: v[:2] for k, v in columns.items()}), [],
         ["already: 1.jpg"]),
        (saved("k.npz", embeddings=eye, ids=names, **columns), ["--metric", "cosine"], ["compares by euclidean"]),
        (saved("l.npz", embeddings=eye, ids=names, **columns), ["--store", "fp16"], ["stores fp32"]),
    ):  # fmt: skip
        assert_one_line_error(run("add", gallery, file, *flags), *facts)
    assert len(ids_of(gallery)) == 10
    new = tmp_path / "new"
    assert_one_line_error(run("add", new, saved("m.npz", embeddings=eye, ids=names)), "--metric euclidean or cosine")
    empty = saved("n.npz", embeddings=eye[:0], ids=names[:0])
    assert_one_line_error(run("add", new, empty, "--metric", "cosine"), "no embeddings", "1 or more")
    assert not new.exists()


def test_models_are_not_mixed(exported, trained, people, tmp_path):
    made = embed(exported, people / "query", tmp_path / "g", device="cpu")
    own = {name: made.column(name) for name in made.columns}
    arrays = {name: each.astype(str) if each.dtype == object else each for name, each in own.items()}
    ids = np.array([f"copy/{name}" for name in made.column("id")])
    np.savez(tmp_path / "more.npz", embeddings=made.embeddings(), ids=ids, **arrays)
    more = tmp_path / "more.npz"
    assert_one_line_error(run("add", tmp_path / "g", more), "a model of PMM made it", "--model FILE")
    assert_one_line_error(run("add", tmp_path / "g", more, "--model", more), "more.npz")
    count = len(made)
    assert f"{count} crops added; {2 * count} crops" in said("add", tmp_path / "g", more, "--model", exported)
    np.savez(tmp_path / "b.npz", embeddings=made.embeddings(), ids=ids)
    new = said("add", tmp_path / "new", tmp_path / "b.npz", "--model", exported)
    assert "384 dimensions, euclidean" in new
    assert Gallery.open(tmp_path / "new").source == made.source
    said("add", tmp_path / "foreign", tmp_path / "b.npz", "--metric", "euclidean")
    done = run("add", tmp_path / "foreign", tmp_path / "b.npz", "--model", exported)
    assert_one_line_error(done, "does not say what made its embeddings")


def test_the_group_explains_itself():
    done = run_here("-m", "pmm", "gallery")
    assert_one_line_error(done, "pmm: error: gallery needs a subcommand", "verify")
    listed = run_here("-m", "pmm", "gallery", "--help").stdout
    for name in ("info", "add", "remove", "compact", "verify", "import", "upgrade"):
        assert f"pmm gallery {name} " in listed
