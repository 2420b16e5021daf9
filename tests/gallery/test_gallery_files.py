"""A gallery's files: written whole or not at all, read whole whatever a writer does, and damage is one line."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pmm.gallery.gallery import Gallery
from pmm.gallery.storage import changes, snapshot
from pmm.gallery.storage.columns import write_array
from pmm.gallery.storage.manifest import FORMAT, MANIFEST, is_gallery
from pmm.gallery.storage.snapshot import GallerySnapshot
from pmm.gallery.storage.writer import LOCK
from pmm.utils.errors import CannotWrite, InvalidFile
from tests.conftest import ROOT
from tests.gallery.test_gallery_kills import files_below, named_files
from tests.refusals import refuses

ROWS, DIM = 20, 4
EMBEDDINGS = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


def names(first: int, count: int = ROWS) -> list[str]:
    return [f"{number:04d}.jpg" for number in range(first, first + count)]


def columns(count: int = ROWS) -> dict[str, list]:
    return {"camera": ["a", "b"] * (count // 2), "time": [1.0] * count, "pid": list(range(count))}


@pytest.fixture
def gallery(tmp_path, no_fsync) -> Gallery:
    found = Gallery.create(tmp_path / "people", EMBEDDINGS, names(0), columns=columns())
    found.add(EMBEDDINGS, names(100), columns())
    found.remove(names(5, 3))
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in files_below(path) | {MANIFEST}}


def test_the_second_writer_is_refused_and_readers_are_not(gallery):
    other = Gallery.open(gallery.path)
    refused = (
        other.compact,
        lambda: other.remove(["0000.jpg"]),
        lambda: other.add(EMBEDDINGS[:2], names(500, 2), columns(2)),
    )
    with gallery.writer():
        for change in refused:
            with refuses(CannotWrite, "in use by another process", path=gallery.path):
                change()
        assert gallery.remove(["0000.jpg"]) == 1
        assert len(Gallery.open(gallery.path)) == 36
    assert other.remove(["0000.jpg", "0001.jpg"]) == 1  # it sees what was written meanwhile


def test_what_a_reader_opened_stays_until_it_lets_go(gallery):
    reader, expected = Gallery.open(gallery.path), gallery.search(EMBEDDINGS[3], 50)
    gallery.compact()
    gallery.compact()
    assert files_below(gallery.path) > named_files(gallery)
    found = reader.search(EMBEDDINGS[3], 50)
    assert (found.ids.tolist(), found.rows.tolist()) == (expected.ids.tolist(), expected.rows.tolist())
    assert reader.column("camera").tolist() == gallery.column("camera").tolist()
    assert reader.verify() == []
    del reader
    gallery.remove(["0000.jpg"])
    assert files_below(gallery.path) == named_files(gallery)
    assert [each.name for each in gallery.path.glob(".readers-*")] == [f".readers-{gallery.manifest.epoch:06d}"]


@pytest.mark.parametrize("change", ["remove", "compact"])
def test_a_reader_that_meets_a_change_takes_the_new_state(gallery, monkeypatch, change):
    """The change comes between the reader's look at the manifest and its lock."""
    lock, changes_left = snapshot.ReadersLock, [1]

    def interrupted(path):
        if changes_left:
            changes_left.clear()
            gallery.remove(["0000.jpg"])
            if change == "compact":
                gallery.compact()
        return lock(path)

    monkeypatch.setattr(snapshot, "ReadersLock", interrupted)
    opened = GallerySnapshot.open(gallery.path)
    assert (opened.manifest, len(opened)) == (gallery.manifest, 36)


def test_readers_beside_a_writer_see_whole_states(tmp_path, no_fsync, monkeypatch):
    monkeypatch.setattr(changes, "CHUNK_BYTES", 24 * DIM * 4)
    path = tmp_path / "people"
    Gallery.create(path, EMBEDDINGS, np.arange(ROWS), columns={"tag": ["x"] * ROWS})
    done, problems, seen = threading.Event(), [], set()

    def read():
        while not done.is_set():
            try:
                found = Gallery.open(path)
                ids = found.column("id")
                seen.add(len(ids))
                assert np.array_equal(np.sort(ids)[-ROWS:] % ROWS, np.arange(ROWS))
                assert found.search(EMBEDDINGS[7], 1).ids[0] % ROWS == 7
                assert found.column("tag").tolist() == ["x"] * len(ids)
            except Exception as error:
                problems.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(2)]
    for each in threads:
        each.start()
    writer = Gallery.open(path)
    for number in range(1, 5):
        writer.add(EMBEDDINGS, np.arange(ROWS) + number * ROWS, {"tag": ["x"] * ROWS})
        if number % 3 == 0:
            writer.remove(np.arange(ROWS) + (number - 2) * ROWS)
            writer.compact()
    done.set()
    for each in threads:
        each.join()
    assert not problems
    assert len(seen) > 1


@pytest.mark.parametrize("step", ["add", "compact", "remove"])
def test_a_disk_that_fills_at_any_file_leaves_all_as_it_was(gallery, monkeypatch, step):
    number = 0
    while True:
        before, generation, calls = contents(gallery.path), gallery.manifest.generation, [0]

        def full(_, at=number, calls=calls):
            calls[0] += 1
            if calls[0] > at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        try:
            take(gallery, step)
        except CannotWrite as error:
            line, hint, path = str(error), error.hint, error.path  # the error itself holds what was opened
        else:
            break
        assert "No space left" in line
        assert hint.startswith("make room")
        assert path in (gallery.path, gallery.path / MANIFEST)
        monkeypatch.setattr(os, "fsync", lambda _: None)
        opened = Gallery.open(gallery.path)
        if opened.manifest.generation == generation:
            assert contents(gallery.path) == before
        else:  # it was full after the manifest had got to its place
            assert opened.verify() == []
            del opened
            gallery.remove(["0019.jpg"])
            assert files_below(gallery.path) == named_files(gallery)
            break
        number += 1
    assert number > 2


def take(gallery: Gallery, step: str) -> None:
    if step == "add":
        gallery.add(EMBEDDINGS, names(900), columns())
    elif step == "remove":
        gallery.remove(names(10, 2))
    else:
        gallery.compact()


def test_a_disk_that_fills_while_a_gallery_is_made_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with refuses(CannotWrite, "No space left", path=tmp_path / "people"):
        Gallery.create(tmp_path / "people", EMBEDDINGS, names(0))
    assert not os.listdir(tmp_path)


def test_a_file_that_may_not_grow_is_one_line_too(gallery):
    script = (
        "import resource, sys; import numpy as np; from pmm.gallery.gallery import Gallery\n"
        "from pmm.utils.errors import CannotWrite; gallery = Gallery.open(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); many = np.ones((5000, 4))\n"
        "columns = {'camera': ['x'] * 5000, 'time': [0] * 5000, 'pid': [0] * 5000}\n"
        "try: gallery.add(many, [str(i) for i in range(5000)], columns)\n"
        "except CannotWrite as error: print(error)\n"
    )
    before = contents(gallery.path)
    done = subprocess.run([sys.executable, "-c", script, str(gallery.path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"{gallery.path}: cannot write: File too large"), done.stderr
    assert done.stdout.count("\n") == 1
    assert contents(gallery.path) == before


def test_read_only_media_are_read_and_not_written_to(gallery, monkeypatch):
    for hidden in gallery.path.glob(".*"):
        hidden.unlink()  # and what was copied without hidden files

    def read_only(path, flags, *more, **named):
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return os_open(path, flags, *more, **named)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    os_open = os.open
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    before = sorted(gallery.path.rglob("*"))
    opened = Gallery.open(gallery.path)
    assert opened.search(EMBEDDINGS[0], 1).ids.tolist() == ["0000.jpg"]
    assert opened.verify() == []
    assert sorted(gallery.path.rglob("*")) == before
    with refuses(CannotWrite, path=gallery.path):
        opened.remove(["0000.jpg"])


def test_files_that_are_missing_or_of_another_size_are_named_on_opening(gallery):
    for name in sorted(files_below(gallery.path)):
        file = gallery.path / name
        whole = file.read_bytes()
        content = (whole[:-1], whole + b"x", b"")[len(name) % 3]
        file.write_bytes(content)
        with refuses(InvalidFile, f"{len(content)} bytes, not {len(whole)}", path=file, hint="copy"):
            Gallery.open(gallery.path)
        file.unlink()
        with refuses(InvalidFile, "missing", path=file):
            Gallery.open(gallery.path)
        file.write_bytes(whole)
    assert Gallery.open(gallery.path).verify() == []


def test_a_flipped_bit_anywhere_is_found_by_verify_and_never_a_crash(gallery):
    for name in sorted(files_below(gallery.path)):
        file = gallery.path / name
        whole, named = file.read_bytes(), set()
        for place in (len(whole) - 1, 9):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 128]) + whole[place + 1 :])
            try:
                opened = Gallery.open(gallery.path)
                assert next(problem.path for problem in opened.verify()) == file
                opened.search(EMBEDDINGS[0])
                opened.column("id")
                opened.column("camera")
            except InvalidFile as error:  # a header, a text, or a row that is not there
                named.add(error.path)
        assert named <= {file, file.parent}
        file.write_bytes(whole)
    assert Gallery.open(gallery.path).verify() == []


@pytest.mark.parametrize("column", ["000001.codes.npy", "000001.terms.npy", "id.keys.npy", "embeddings.npy"])
def test_files_that_do_not_fit_each_other_are_found_by_verify(gallery, column):
    """Each is what the manifest says, but it is of the rows in another order."""
    kind = "codes" if column[0] == "0" else "chunks"
    manifest = json.loads((gallery.path / MANIFEST).read_text())
    entry = manifest["codes"] if kind == "codes" else manifest["chunks"][0]
    file = gallery.path / kind / entry["name"] / column
    stored = write_array(file, np.load(file)[::-1])
    entry["files"][column] = dataclasses.asdict(stored)
    (gallery.path / MANIFEST).write_text(json.dumps(manifest))
    (problem, *_) = Gallery.open(gallery.path).verify()
    assert "short code" in problem.problem or "id " in problem.problem


BAD_MANIFESTS = {
    "format is 'pmm-gallery-9'": lambda m: m.update(format="pmm-gallery-9"),
    "format is 'None'": lambda m: m.pop("format"),
    "no field dim": lambda m: m.pop("dim"),
    "metric is 'taxi'": lambda m: m.update(metric="taxi"),
    "dim is 0": lambda m: m.update(dim=0),
    "unknown field rows": lambda m: m.update(rows=3),
    "chunks.name is '../../etc'": lambda m: m["chunks"][0].update(name="../../etc"),
    "chunks.rows is -1": lambda m: m["chunks"][0].update(rows=-1),
    "chunks.files is '../x.npy'": lambda m: m["chunks"][0]["files"].update({"../x.npy": {"size": 1, "sha256": ""}}),
    "columns is 'id'": lambda m: m["columns"].update(id="text"),
    "columns.camera is 'pickle'": lambda m: m["columns"].update(camera="pickle"),
    "codes is None": lambda m: m.update(codes=None),
    "chunks.rows is 1000000000000000000000": lambda m: m["chunks"][0].update(rows=10**21),
    "dim is 100000": lambda m: m.update(dim=100_000),
    "generation is -1": lambda m: m.update(generation=-1),
    "next_number is -5": lambda m: m.update(next_number=-5),
    "next_number is 1000000000000": lambda m: m.update(next_number=10**12),
    "epoch is 0": lambda m: m.update(epoch=0),
    "epoch is 99": lambda m: m.update(epoch=99),
    "chunks is ['000001', '000001'": lambda m: m["chunks"][1].update(name="000001"),
    "below next_number 3": lambda m: m.update(next_number=3),
    "source is 3": lambda m: m.update(source=3),
    "thresholds.fmr is 2.0": lambda m: m.update(
        thresholds=[{"fmr": 2, "distance": 1, "kind": "given", "precision": "fp32", "stored": "fp32"}]
    ),
}


@pytest.mark.parametrize("reason", BAD_MANIFESTS)
def test_a_manifest_that_is_none_is_one_line(gallery, reason):
    manifest = json.loads((gallery.path / MANIFEST).read_text())
    BAD_MANIFESTS[reason](manifest)
    (gallery.path / MANIFEST).write_text(json.dumps(manifest))
    with refuses(InvalidFile, reason, path=gallery.path / MANIFEST):
        Gallery.open(gallery.path)


def test_rows_that_a_manifest_makes_up_are_not_read(gallery):
    manifest = json.loads((gallery.path / MANIFEST).read_text())
    manifest["chunks"][0]["rows"] = 10**12
    (gallery.path / MANIFEST).write_text(json.dumps(manifest))
    with refuses(InvalidFile, "1000000000000 rows", path=gallery.path / "chunks" / "000001" / "embeddings.npy"):
        Gallery.open(gallery.path)
    manifest["chunks"][0]["rows"] = ROWS
    del manifest["chunks"][0]["files"]["camera.codes.npy"], manifest["chunks"][0]["files"]["time.npy"]
    (gallery.path / MANIFEST).write_text(json.dumps(manifest))
    for name in ("camera", "time"):
        with refuses(InvalidFile):
            Gallery.open(gallery.path).column(name)


def test_places_that_are_no_gallery_are_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"format": "something else"}')
    for name, problem in (("none", "does not exist"), ("file", "no folder"), ("empty", f"no {MANIFEST}")):
        with refuses(InvalidFile, problem, path=tmp_path / name, expected="a gallery"):
            Gallery.open(tmp_path / name)
        assert not is_gallery(tmp_path / name)
    with refuses(InvalidFile, "something else", path=tmp_path / "other" / MANIFEST, expected=FORMAT):
        Gallery.open(tmp_path / "other")
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"format": "pmm-gallery-1"}'):
        (tmp_path / "broken" / MANIFEST).write_bytes(content)
        with refuses(InvalidFile, path=tmp_path / "broken" / MANIFEST):
            Gallery.open(tmp_path / "broken")


def test_leftovers_of_a_killed_create_are_written_over(tmp_path, gallery):
    left = tmp_path / "left"
    shutil.copytree(gallery.path, left)
    (left / MANIFEST).rename(left / f".{MANIFEST}.abcd.json")
    made = Gallery.create(left, EMBEDDINGS[:2], names(0, 2))
    assert (len(made), files_below(left)) == (2, named_files(made))
    assert {each.name for each in left.iterdir()} == {
        LOCK,
        ".readers-000001",
        MANIFEST,
        "chunks",
        "codes",
        "tombstones",
    }
