"""Galleries from outside: what others made of a folder is refused in one line, and what the system refuses is told."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pmm.gallery.gallery import Gallery
from pmm.gallery.storage import manifest
from pmm.gallery.storage.columns import write_array
from pmm.gallery.storage.manifest import MANIFEST, is_gallery
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses

ROWS = 20
EMBEDDINGS = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)


@pytest.fixture
def gallery(tmp_path, no_fsync) -> Gallery:
    columns = {"camera": ["a", "b"] * (ROWS // 2), "time": [1.0] * ROWS}
    return Gallery.create(tmp_path / "people", EMBEDDINGS, np.arange(ROWS), columns=columns)


def test_a_copy_without_hidden_files_protects_its_readers_once_it_was_written_to(gallery):
    for hidden in gallery.path.glob(".readers-*"):
        hidden.unlink()
    with gallery.writer():
        pass
    reader = Gallery.open(gallery.path)
    gallery.compact()
    gallery.compact()
    assert reader.search(EMBEDDINGS[3], 1).ids.tolist() == [3]
    assert reader.column("camera").tolist() == gallery.column("camera").tolist()


def test_manifests_that_are_no_files_or_endless_are_one_line(gallery, monkeypatch):
    file = gallery.path / MANIFEST
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    assert not is_gallery(gallery.path)
    with refuses(InvalidFile, "no file", path=file):
        Gallery.open(gallery.path)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert not is_gallery(gallery.path)
    with refuses(InvalidFile, "no file", path=file):
        Gallery.open(gallery.path)
    file.unlink()
    file.write_bytes(content)
    monkeypatch.setattr(manifest, "_MOST_BYTES", len(content) - 1)
    with refuses(InvalidFile, "more than", path=file):
        Gallery.open(gallery.path)


def test_what_the_system_does_not_let_be_read_is_one_line(gallery, monkeypatch):
    def denied(path, *more, **named):
        if Path(path).name == name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *more, **named)

    stat = os.stat
    monkeypatch.setattr(os, "stat", denied)
    for name in ("id.npy", "people"):  # noqa: B007
        with refuses(InvalidFile, f"it cannot be read ({os.strerror(errno.EACCES)})", hint="") as caught:
            Gallery.open(gallery.path)
        assert str(caught.value).count("people") == 1
    monkeypatch.setattr(os, "stat", stat)


def test_a_process_that_may_open_few_files_is_told_what_helps(gallery, monkeypatch):
    opened = Gallery.open(gallery.path)

    def full(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", full)
    with refuses(InvalidFile, "Too many open files", hint="ulimit -n"):
        opened.column("time")


@pytest.mark.parametrize(
    "header", [b"{'descr': (", b"'''", b"(" * 60, b"\x00", b"{'descr': '<f4', 'shape': (10**400,)}"]
)
def test_headers_of_columns_that_are_none_are_one_line(gallery, header):
    file = gallery.path / "chunks" / "000001" / "time.npy"
    whole = file.read_bytes()
    file.write_bytes(
        whole[:10] + header.ljust(len(whole) - 10 - 8 * ROWS)[: len(whole) - 10 - 8 * ROWS] + whole[-8 * ROWS :]
    )
    assert file.stat().st_size == len(whole)
    with refuses(InvalidFile, "damaged", path=file):
        Gallery.open(gallery.path).column("time")


def test_more_texts_than_rows_are_not_read(gallery):
    contents = json.loads((gallery.path / MANIFEST).read_text())
    file = gallery.path / "chunks" / "000001" / "camera.offsets.npy"
    stored = write_array(file, np.zeros(ROWS + 2, np.int64))
    contents["chunks"][0]["files"]["camera.offsets.npy"] = dataclasses.asdict(stored)
    (gallery.path / MANIFEST).write_text(json.dumps(contents))
    with refuses(InvalidFile, "more texts in camera than rows", path=file.parent):
        Gallery.open(gallery.path).column("camera")


def test_a_reader_does_not_mix_two_galleries(gallery):
    """Another one of equal sizes takes the folder's place; what was not read yet is gone."""
    reader = Gallery.open(gallery.path)
    ids = reader.column("id")
    shutil.rmtree(gallery.path)
    columns = {"camera": ["x", "y"] * (ROWS // 2), "time": [2.0] * ROWS}
    Gallery.create(gallery.path, EMBEDDINGS[::-1], np.arange(ROWS), columns=columns)
    assert reader.column("id").tolist() == ids.tolist()
    for look in (lambda: reader.column("time"), lambda: reader.search(EMBEDDINGS[0]), reader.embeddings):
        with refuses(InvalidFile, "missing"):
            look()
