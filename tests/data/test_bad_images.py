"""Images that cannot be read are all told, or left out and counted."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from pmm.data import bad_images
from pmm.data.bad_images import (
    bad_image_lines,
    first_look,
    load_readable,
    naming_all,
    refuse_at_sight,
    refuse_bad_images,
    refuse_none_left,
    unreadable_images,
)
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Resize
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses


@pytest.mark.parametrize("headers", [True, False])
def test_the_first_look_finds_what_is_bad_at_sight(people, tmp_path, monkeypatch, headers):
    if not headers:
        monkeypatch.setattr(bad_images, "HEADERS_READ", 0)
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
    with refuses(InvalidFile, "0.jpg (why), 1.jpg (why), 2.jpg (why), 20 more;", path=tmp_path):
        refuse_bad_images(dict.fromkeys(bad, "why"), tmp_path)


@pytest.fixture
def files(people, tmp_path):
    """Six images, of which the second is empty and the fourth and the last are damaged."""
    found = []
    for number, path in enumerate(sorted((people / "query").glob("*.jpg"))[:6]):
        found.append(shutil.copy(path, tmp_path / f"{number}.jpg"))
        content = path.read_bytes()
        if number in (1, 3, 5):
            found[-1].write_bytes(content[: len(content) // 2] if number > 1 else b"")
    return found


def test_all_that_cannot_be_decoded_is_found_in_order(files):
    bad = unreadable_images(files)
    assert list(bad) == [files[1], files[3], files[5]]
    assert "empty" in bad[files[1]]
    assert "truncated" in bad[files[3]]
    assert unreadable_images(files[:1]) == {}


def test_what_was_not_looked_at_yet_is_named_too(files, tmp_path, monkeypatch):
    first = first_look(files)
    with refuses(
        InvalidFile, "1.jpg (", "3.jpg (", "5.jpg (", path=tmp_path, problem="3 images", hint="--skip-bad"
    ) as e:
        refuse_bad_images(first, tmp_path, unseen=files[2:])
    assert e.value.problem.startswith("3 images")
    monkeypatch.setattr(bad_images, "HEADERS_READ", 2)
    with refuses(InvalidFile, "at least 2 images", path=tmp_path):
        refuse_bad_images(first, tmp_path, unseen=files[2:])


def test_where_no_image_is_left_the_first_says_why(files, tmp_path):
    bad = unreadable_images(files)
    refuse_none_left(bad, files, tmp_path)
    refuse_none_left({}, [], tmp_path)
    with refuses(InvalidFile, "none of 3 images", "1.jpg (it is empty)", path=tmp_path):
        refuse_none_left(bad, list(bad), tmp_path)


def test_lines_about_bad_images_have_an_end(tmp_path):
    bad = {tmp_path / f"{number}.jpg": "why" for number in range(1, 23)}
    lines = bad_image_lines(bad)
    assert (len(lines), lines[0], lines[-1]) == (21, f"left out {tmp_path}/1.jpg: why", "left out 2 more images")
    assert len(bad_image_lines(dict(list(bad.items())[:20]))) == 20
    assert bad_image_lines({}) == []


def test_crops_to_judge_or_calibrate_on_are_those_that_can_be_read(files, caplog):
    size = Resize(height=16, width=8)
    good = [files[0], files[2], files[4]]
    crops = load_readable(files, size, least=3)
    np.testing.assert_array_equal(crops, load_crops(good, size))
    assert "3 images of 6 left out" in caplog.text
    assert str(files[1]) in caplog.text
    with refuses(InvalidFile, path=files[1]):
        load_readable(files, size, least=4)
    caplog.clear()
    assert len(load_readable(good, size, least=1)) == 3
    assert not caplog.text


def damaged(folder, image, count):
    """Files that begin as images and cannot be read, and as many good ones."""
    files = []
    for number in range(2 * count):
        files.append(folder / f"{number}.jpg")
        files[-1].write_bytes(image.read_bytes()[: None if number % 2 else -200])
    return files


def test_one_that_is_bad_at_sight_has_all_named_and_without_it_none_is_decoded(people, tmp_path, monkeypatch):
    files = damaged(tmp_path, min((people / "query").glob("*.jpg")), 3)
    with monkeypatch.context() as patch:
        patch.setattr(bad_images, "unreadable_images", lambda files: pytest.fail("they are decoded in training"))
        refuse_at_sight(files, tmp_path)
    (tmp_path / "empty.jpg").touch()
    with refuses(InvalidFile, "4 images", "empty.jpg (it is empty)", "0.jpg", "2.jpg", "4.jpg", path=tmp_path):
        refuse_at_sight([*files, tmp_path / "empty.jpg"], tmp_path)


def test_an_error_of_one_image_becomes_that_of_all(people, tmp_path, monkeypatch):
    files = damaged(tmp_path, min((people / "query").glob("*.jpg")), 2)
    first = InvalidFile("damaged", path=files[0])
    assert naming_all(first, files[:2]) is first
    error = naming_all(first, files, hint="mend them")
    assert (error.path, error.hint) == (tmp_path, "mend them")
    assert error.problem.startswith("2 images cannot be read: 0.jpg (not a readable image")
    monkeypatch.chdir(tmp_path)
    assert (
        "2 images cannot be read: 0.jpg (" in naming_all(first, [file.relative_to(tmp_path) for file in files]).problem
    )
