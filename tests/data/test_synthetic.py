"""Synthetic people: reproducible to the byte, counted and named as Market-1501, distinct, and whole or not there."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm.data.synthetic import dataset
from pmm.data.synthetic.camera import sample_cameras
from pmm.data.synthetic.dataset import draw_dataset
from pmm.data.synthetic.draw import draw_crop, draw_junk
from pmm.data.synthetic.figure import Pose, draw_person
from pmm.data.synthetic.identity import CLUES, Identity, sample_identities
from pmm.utils.errors import CannotWrite, InvalidValue
from tests.conftest import IDS
from tests.refusals import refuses

SEED = 7
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(r"(-1|\d{4})_c(\d)s1_(\d{6})_(\d\d)\.jpg")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def parsed(folder: Path) -> list[tuple[int, int]]:
    """(pid, camera as in the name) of every file; every name must match."""
    names = [NAME.fullmatch(path.name) for path in sorted(folder.iterdir())]
    assert all(names)
    return [(int(name[1]), int(name[2])) for name in names if name]


@pytest.fixture(scope="module")
def drawn(people: Path) -> Path:
    return people


def test_same_bytes_whatever_the_workers(drawn: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    draw_dataset(tmp_path / "again", ids=IDS, seed=SEED, workers=2, progress=lambda *call: calls.append(call))
    assert digests(tmp_path / "again") == digests(drawn)
    total = calls[-1][1]
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert total == sum(len(list((drawn / folder).iterdir())) for folder in FOLDERS)


def test_another_seed_draws_other_people(drawn: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "other", ids=2, seed=4, workers=1)
    name = "bounding_box_train/0001_c1s1_000100_00.jpg"
    assert (tmp_path / "other" / name).read_bytes() != (drawn / name).read_bytes()


def test_no_crop_is_there_twice(drawn: Path) -> None:
    assert max(Counter(digests(drawn).values()).values()) == 1


def test_counts_names_and_cameras(drawn: Path) -> None:
    train, query, gallery = (parsed(drawn / folder) for folder in FOLDERS)
    cameras = range(1, 7)
    assert Counter(train) == {(pid, camera): 2 for pid in range(1, IDS + 1) for camera in cameras}
    tested = range(IDS + 1, 2 * IDS + 1)
    assert Counter(query) == {(pid, camera): 1 for pid in tested for camera in cameras}
    assert Counter(item for item in gallery if item[0] > 0) == {
        (pid, camera): 2 for pid in tested for camera in cameras
    }


def test_gallery_holds_distractors_and_junk(drawn: Path) -> None:
    pids = [pid for pid, _ in parsed(drawn / "bounding_box_test")]
    counted = sum(pid >= 0 for pid in pids)
    assert 0.15 <= pids.count(0) / counted <= 0.25
    assert 0.01 <= pids.count(-1) / counted <= 0.06


def test_images_and_summary(drawn: Path) -> None:
    with Image.open(next((drawn / "query").iterdir())) as image:
        assert (image.size, image.mode, image.format) == ((64, 128), "RGB", "JPEG")
    summary = json.loads((drawn / "synthetic.json").read_text())
    assert (summary["ids"], summary["seed"], summary["cameras"], summary["format"]) == (IDS, SEED, 6, dataset.FORMAT)
    assert summary["counts"]["bounding_box_test"] == len(list((drawn / "bounding_box_test").iterdir()))
    assert set(summary["versions"]) == {"numpy", "pillow"}


def test_smallest_data_set_with_two_cameras(tmp_path: Path) -> None:
    summary = draw_dataset(tmp_path / "people", ids=2, seed=0, cameras=2, workers=1)
    assert summary["counts"]["junk"] >= 1
    assert {camera for _, camera in parsed(tmp_path / "people" / "query")} == {1, 2}


def test_appearances_are_distinct_over_all_parts() -> None:
    world = dataset._create_world(ids=300, seed=0, cameras=6)
    people = [*world.train, *world.test, *world.distractors]
    assert len({person.appearance for person in people}) == len(people)


def test_many_identities_are_near_copies() -> None:
    people = sample_identities(np.random.default_rng(0), 200)

    def differing(a: Identity, b: Identity) -> int:
        return sum(any(getattr(a, name) != getattr(b, name) for name in clue) for clue in CLUES)

    close = sum(min(differing(person, other) for other in people[:k]) <= 5 for k, person in enumerate(people) if k)
    assert 0.3 <= close / len(people) <= 0.6


def test_what_is_not_worn_is_no_appearance() -> None:
    person = replace(sample_identities(np.random.default_rng(0), 1)[0], bag="none", hat="none", pattern="plain")
    assert replace(person, bag_colour="red", hat_colour="green", second="black").appearance == person.appearance
    assert replace(person, bag="back").appearance != person.appearance


def figure(person: Identity, azimuth: float) -> np.ndarray:
    scene = Image.new("RGB", (128, 256), (190, 195, 200))
    pose = Pose(phase=1.0, stride=0.3, swing=0.3)
    draw_person(scene, person, azimuth=azimuth, foot=(64, 246), height=236, pose=pose)
    return np.asarray(scene, dtype=np.int64)


def changed_share(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a - b).max(axis=2) > 30).mean())


@pytest.fixture
def plain() -> Identity:
    person = sample_identities(np.random.default_rng(1), 1)[0]
    return replace(
        person, upper="white", second="red", pattern="plain", bag="none", bag_colour="green", hair_style="short"
    )


def test_logo_is_seen_from_the_front_only(plain: Identity) -> None:
    logo = replace(plain, pattern="logo")
    assert changed_share(figure(plain, 0), figure(logo, 0)) > 0.005
    assert changed_share(figure(plain, 180), figure(logo, 180)) == 0


def test_backpack_is_seen_from_behind_and_its_straps_from_the_front(plain: Identity) -> None:
    packed = replace(plain, bag="back")
    front, side, back = (changed_share(figure(plain, a), figure(packed, a)) for a in (0, 90, 180))
    assert back > 2 * front > 0
    assert side > 0.005


def test_left_bag_is_on_the_persons_left(plain: Identity) -> None:
    bag = replace(plain, bag="left")
    from_the_left, from_the_right = (changed_share(figure(plain, a), figure(bag, a)) for a in (270, 90))
    assert from_the_left > 2 * from_the_right
    # From the front, the person's left is the picture's right.
    columns = np.nonzero(np.abs(figure(plain, 0) - figure(bag, 0)).max(axis=(0, 2)) > 30)[0]
    assert columns.max() - 64 > 64 - columns.min()


@pytest.mark.parametrize("clue", CLUES, ids=[clue[0] for clue in CLUES])
def test_every_clue_changes_the_picture(plain: Identity, clue: tuple[str, ...]) -> None:
    others = sample_identities(np.random.default_rng(5), 20)
    variants = [replace(plain, **{name: getattr(other, name) for name in clue}) for other in others]
    # A pattern in the colour of its own cloth is never sampled.
    visible = [person for person in variants if person.second != person.upper]
    variant = next(person for person in visible if person.appearance != plain.appearance)
    assert max(changed_share(figure(plain, a), figure(variant, a)) for a in (0, 90, 180, 270)) > 0.001


@pytest.mark.parametrize("kind", ["person", "junk"])
def test_a_crop_depends_on_its_generator_only(kind: str) -> None:
    people = sample_identities(np.random.default_rng(0), 4)
    camera = sample_cameras(np.random.default_rng(1), 6)[2]

    def draw(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return draw_crop(people[0], camera, rng, people) if kind == "person" else draw_junk(camera, rng, people)

    first, again, other = draw(7), draw(7), draw(8)
    assert first.shape == (128, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_draw_leaves_nothing(tmp_path: Path, workers: int) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path / "people", ids=4, seed=0, workers=workers, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder(tmp_path: Path) -> None:
    out = tmp_path / "people"
    out.mkdir()
    draw_dataset(out, ids=2, seed=0, cameras=2, workers=1)  # an empty folder may be filled
    before = digests(out)
    with refuses(CannotWrite, "not empty", path=out):
        draw_dataset(out, ids=2, seed=1, cameras=2, workers=1)
    assert digests(out) == before
    with refuses(CannotWrite, "not empty", path=out / "synthetic.json"):
        draw_dataset(out / "synthetic.json", ids=2, seed=1, cameras=2, workers=1)


@pytest.mark.parametrize(
    "wrong",
    [{"ids": 1}, {"ids": 5000}, {"seed": -1}, {"cameras": 1}, {"cameras": 10}, {"workers": 0}],
    ids=str,
)
def test_numbers_out_of_range(tmp_path: Path, wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with refuses(InvalidValue, name=name, value=value):
        draw_dataset(tmp_path / "people", **({"ids": 2, "seed": 0} | wrong))
    assert list(tmp_path.iterdir()) == []
