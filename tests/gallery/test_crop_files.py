"""Which files of a folder are its crops."""

from __future__ import annotations

import os

from pmm.data.left_out import by_reason
from pmm.gallery.crop_files import images_below, walk_images
from pmm.utils.errors import InvalidFile
from tests.data import trees
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


def test_everything_in_a_folder_is_an_image_or_left_out_for_a_reason(tmp_path):
    names = [
        "a.jpg",
        "b.heic",
        "c.HEIF",
        "crops.zip",
        "film.mp4",
        "notes.txt",
        ".hidden.jpg",
        ".cache/x.jpg",
        "below/d.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "linked").symlink_to(tmp_path / "below")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    walked = walk_images(tmp_path)
    assert [path.name for path in walked.images] == ["a.jpg", "d.png", "link.jpg"]
    assert {reason.name: [path.name for path in paths] for reason, paths in by_reason(walked.left_out).items()} == {
        "other kind": ["b.heic", "c.HEIF"],
        "linked": ["linked"],
        "archive": ["crops.zip"],
        "video": ["film.mp4"],
        "no image": ["notes.txt"],
        "hidden": [".cache", ".hidden.jpg"],
    }
    lines = walked.lines
    assert lines[0].startswith("left out 2 images of kinds that are not read: b.heic and 1 more; convert")
    assert "left out 1 linked folder: linked; copy it, or give it as a folder of its own" in lines
    assert len(lines) == 6


def test_a_folder_without_a_single_image_says_what_to_do_with_what_it_holds(tmp_path):
    for name in ("b.heic", "crops.zip"):
        (tmp_path / name).write_bytes(b"x")
    with refuses(InvalidFile, "b.heic; convert to JPEG or PNG", path=tmp_path, hint="crops.zip; unpack it"):
        walk_images(tmp_path)
    with refuses(InvalidFile, path=tmp_path / "crops.zip", hint="unpack it and give the folder"):
        walk_images(tmp_path / "crops.zip")
    (tmp_path / "a.jpg").write_bytes(b"")
    with refuses(InvalidFile, path=tmp_path / "a.jpg", hint=f"{tmp_path}"):
        walk_images(tmp_path / "a.jpg")
    with refuses(InvalidFile, "none of its 1 images", path=tmp_path):
        walk_images(tmp_path).readable(skip_bad_images=True)


def test_a_folder_that_cannot_be_read_is_bad_as_an_image_is(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    trees.draw(tmp_path / "a.png")
    walk = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return walk(path)

    monkeypatch.setattr(os, "scandir", scandir)
    walked = walk_images(tmp_path)
    with refuses(InvalidFile, "closed (a folder: Permission denied)", path=tmp_path, hint="--skip-bad-images"):
        walked.readable(skip_bad_images=False)
    files, bad = walked.readable(skip_bad_images=True)
    assert (files, list(bad)) == ([tmp_path / "a.png"], [tmp_path / "closed"])
    with refuses(InvalidFile, "Permission denied", path=tmp_path / "closed"):
        images_below(tmp_path)
