"""Which files of a folder are its crops."""

from __future__ import annotations

import os

import pytest

from pmm.gallery import crop_files
from pmm.gallery.crop_files import first_look, images_below, refuse_bad_images
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses


def test_images_below_are_sorted_and_hidden_or_foreign_files_left_out(tmp_path):
    kept = ["B.JPG", "a.png", "below/d.bmp", "below/deeper/c.jpeg", "folder.jpg/e.png"]
    for name in (*kept, ".hidden.jpg", ".cache/x.jpg", "below/.x/y.png", "Thumbs.db", "notes.txt", "x.jpg.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "round").symlink_to(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in images_below(tmp_path)] == kept


def test_places_without_images_are_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with refuses(InvalidFile, "no image", path=tmp_path, expected=".jpg"):
        images_below(tmp_path)
    for name in ("none", "notes.txt"):
        with refuses(InvalidFile, path=tmp_path / name, expected="a folder"):
            images_below(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.jpg")
    with refuses(InvalidFile, "no regular file", path=tmp_path / "pipe.jpg"):
        images_below(tmp_path)


@pytest.mark.parametrize("headers", [True, False])
def test_the_first_look_finds_what_is_bad_at_sight(people, tmp_path, monkeypatch, headers):
    if not headers:
        monkeypatch.setattr(crop_files, "HEADERS_READ", 0)
    good = min((people / "query").glob("*.jpg"))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    files = [good, tmp_path / "empty.jpg", tmp_path / "gone.jpg", tmp_path / "text.jpg"]
    assert list(first_look(files)) == files[1 : 4 if headers else 3]


def test_bad_images_are_named_up_to_a_limit(tmp_path):
    refuse_bad_images({}, tmp_path)
    bad = {tmp_path / f"{number}.jpg": "why" for number in range(22)} | {tmp_path / "22.jpg": "another reason"}
    with refuses(InvalidFile, "23 images", "0.jpg (why), 1.jpg (why)", "19.jpg (why), 3 more", path=tmp_path):
        refuse_bad_images(bad, tmp_path)
    with refuses(InvalidFile, "at least 23 images", path=tmp_path):
        refuse_bad_images(bad, tmp_path, more=True)
    with refuses(InvalidFile, "0.jpg (why), 1.jpg (why), 2.jpg (why), 20 more;", path=tmp_path):
        refuse_bad_images(dict.fromkeys(bad, "why"), tmp_path)
