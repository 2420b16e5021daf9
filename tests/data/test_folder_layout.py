"""Folders above those of people: cameras, dates, parts, a level too many or too few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.artifacts.origin import resolve_dataset
from pmm.data import folders
from pmm.data.dataset_specs import dataset_spec
from pmm.data.folder_layout import LEVELS, at_level, fits, mostly_deeper, numbered_cameras
from pmm.data.readers import read_dataset
from pmm.data.samples import JUNK
from pmm.utils.errors import InvalidFile, InvalidValue
from tests.conftest import assert_one_line_error, examples, run_here
from tests.data import trees
from tests.refusals import refuses

CAMERAS_OUTSIDE = ["cam1/p1/1.jpg", "cam1/p2/2.jpg", "cam2/p1/3.jpg", "cam2/p2/4.jpg", "cam2/p2/5.jpg"]


def ids(samples):
    return [(sample.pid, sample.camid) for sample in samples]


def refused(root, *facts, dataset="folder", **attributes):
    with refuses(InvalidFile, *facts, **attributes) as caught:
        read_dataset(dataset, root)
    return caught.value


def test_cameras_above_people_are_no_people(tmp_path):
    trees.folders(tmp_path, CAMERAS_OUTSIDE)
    refused(tmp_path, "cam1, cam2", "p1, p2", path=tmp_path, hint="--dataset folder:camera/identity")
    done = run_here("-m", "pmm", "check", "--dataset", "folder", "--root", tmp_path)
    assert_one_line_error(done, "--dataset folder:camera/identity")
    assert not done.stdout, "no false figure"
    split = read_dataset("folder:camera/identity", tmp_path)
    assert ids(split.train) == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 2)]
    assert ids(split.query) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert folders.NO_CAMERAS not in split.notes


def test_folders_of_cameras_below_people_are_not_lost_in_silence(tmp_path):
    trees.folders(tmp_path, ["ann/cam3/1.jpg", "ann/cam5/1.jpg", "bob/cam3/1.jpg", "-1/cam5/1.jpg"])
    refused(tmp_path, "ann, bob", path=tmp_path, hint="--dataset folder:identity/camera")
    assert ids(read_dataset("folder:identity/camera", tmp_path).train) == [(1, 3), (1, 5), (2, 3)]
    whole = read_dataset("folder:identity/any", tmp_path)
    assert ids(whole.train) == [(1, -1), (1, -1), (2, -1)]
    assert folders.NO_CAMERAS in whole.notes


def test_dates_above_people_and_people_numbered_anew_each_day(tmp_path):
    trees.folders(tmp_path, ["2026-05-01/p1/1.jpg", "2026-05-02/p1/1.jpg", "2026-05-02/p2/1.jpg"])
    refused(tmp_path, path=tmp_path, hint="--dataset folder:date/identity")
    assert ids(read_dataset("folder:date/identity", tmp_path).train) == [(1, -1), (1, -1), (2, -1)]
    assert ids(read_dataset("folder:identity/identity", tmp_path).train) == [(1, -1), (2, -1), (3, -1)]


@pytest.mark.parametrize(
    ("paths", "facts"),
    [
        (["north/p1/1.jpg", "south/p1/1.jpg"], ["folder:identity/any if north, south", "folder:any/identity if p1"]),
        (["2026-05-01/cam1/p1/1.jpg", "2026-05-02/cam2/p1/1.jpg"], ["folder:date/camera/identity"]),
        (["people/p1/1.jpg", "people/p2/1.jpg"], ["--root {root}/people"]),
        (["x/y/p1/1.jpg", "x/y/p2/1.jpg"], ["--root {root}/x/y,"]),
        (["training/p1/1.jpg", "val/p2/1.jpg"], ["rename training to train, val to test"]),
        (["a/1.jpg", "b/x/1.jpg", "c/x/1.jpg", "c/x/y/1.jpg"], ["folder:identity/any", "c/x/y", "2 folders deep"]),
        (["cam1/thumb.jpg", *CAMERAS_OUTSIDE], ["folder:camera/identity", "in cam1"]),
    ],
)
def test_a_root_too_high_names_the_root_or_the_layout(tmp_path, paths, facts):
    trees.folders(tmp_path, paths)
    refused(tmp_path, *(fact.replace("{root}", str(tmp_path)) for fact in facts), path=tmp_path)


def test_parts_may_be_too_deep_too(tmp_path):
    paths = ["train/cam1/p1/1.jpg", "query/cam1/p2/1.jpg", "gallery/cam2/p2/2.jpg"]
    trees.folders(tmp_path, paths)
    refused(tmp_path, path=tmp_path / "train", hint="--dataset folder:camera/identity")
    split = read_dataset("folder:camera/identity", tmp_path)
    assert (ids(split.train), ids(split.query), ids(split.gallery)) == ([(1, 1)], [(2, 1)], [(2, 2)])
    (tmp_path / "query").rename(tmp_path / "probe")
    refused(tmp_path, path=tmp_path, hint=f"rename {tmp_path}/probe to query")


def test_a_root_too_low_names_the_root(tmp_path):
    trees.folders(tmp_path / "flat", ["p1/1.jpg", "p2/1.jpg", "p2/2.jpg"])
    refused(tmp_path / "flat/p2", path=tmp_path / "flat/p2", hint=f"--root {tmp_path}/flat")
    trees.folders(tmp_path / "deep", ["ann/cam1/1.jpg", "ann/cam2/1.jpg", "bob/cam1/1.jpg"])
    hint = f"--root {tmp_path}/deep --dataset folder:identity/camera"
    refused(tmp_path / "deep/ann", "cam1, cam2", path=tmp_path / "deep/ann", hint=hint)
    assert ids(read_dataset("folder:identity", tmp_path / "deep/ann").train) == [(1, -1), (2, -1)], "as asked for"
    trees.folders(tmp_path / "alone", ["1.jpg", "2.jpg"])
    refused(tmp_path / "alone", path=tmp_path / "alone", hint="folder of its own")
    trees.three_folders(tmp_path / "market")
    refused(tmp_path / "market/query", "--dataset market1501", hint=f"--root {tmp_path}/market")
    trees.folders(tmp_path / "parts", [f"{part}/p{n}/{part}.jpg" for part in ("query", "gallery") for n in (1, 2)])
    note = folders.ONE_PART.format(tmp_path / "parts/query", tmp_path / "parts")
    assert note in read_dataset("folder", tmp_path / "parts/query").notes
    assert note not in read_dataset("folder", tmp_path / "parts").notes


def test_what_does_not_fit_the_layout_is_a_problem(tmp_path):
    trees.folders(tmp_path, [*CAMERAS_OUTSIDE, "cam1/stray.jpg", "top.jpg", "cam1/p1/x/1.jpg"])
    for path in ("cam1/p1/x/1.jpg", "cam1/stray.jpg", "top.jpg"):
        with refuses(InvalidFile, "camera/identity/IMAGE"):
            read_dataset("folder:camera/identity", tmp_path)
        (tmp_path / path).unlink()
    assert len(read_dataset("folder:camera/identity", tmp_path).train) == 5
    (tmp_path / "cam3").symlink_to(tmp_path / "cam1")  # it cannot lead in a circle, as the layout has an end
    assert {sample.camid for sample in read_dataset("folder:camera/identity", tmp_path).train} == {1, 2, 3}
    (tmp_path / "cam3/p1/round").symlink_to(tmp_path)
    refused(tmp_path, dataset="folder:camera/identity", problem="linked folder", path=tmp_path / "cam1/p1/round")


@pytest.mark.parametrize(
    "names",
    [
        "cam1 cam2", "camA camB", "CCTV-1 CCTV-2", "gopro1 gopro2", "ch01 ch02", "cam_front1 cam_back1", "c1s1 c2s1",
        "front_cam back_cam2", "01-05-2026 31-05-2026", "2026-W01 2026-W02", "2026-01 2026-02", "2026-5-1 2026-5-2",
        "20260501 20260502", "cam1 cam2 lobby", "c1 ann",
    ],
)  # fmt: skip
def test_names_of_cameras_and_dates_are_no_peoples(tmp_path, names):
    root = trees.folders(tmp_path, [f"{name}/{number}.jpg" for name in names.split() for number in (1, 2)])
    refused(root, "folder:identity", names.split()[0], path=root, problem="not as people")
    assert len(read_dataset("folder:identity", root).train) == 2 * len(names.split())


@pytest.mark.parametrize("names", ["ann bob", "0001 0002", "2001_12 2002_1", "Cami Cleo", "p1 c1 p2", "came view"])
def test_names_of_people_are_no_cameras(tmp_path, names):
    trees.folders(tmp_path, [f"{name}/1.jpg" for name in names.split()])
    split = read_dataset("folder", tmp_path)
    assert f"identities are the folders {', '.join(sorted(names.split()))}" in split.notes


@pytest.mark.parametrize("deep", [1, 2, 3])
def test_a_folder_more_does_not_make_people_of_cameras(tmp_path, deep):
    loose = [f"cam{n}/{image}.jpg" for n in range(1, 7) for image in (1, 2, 3)]
    refused(trees.folders(tmp_path / "a", [*loose, "cam1/old/1.jpg"]), path=tmp_path / "a", problem="cam1, cam2, cam3")
    below = [f"cam{n}/{who}/1.jpg" for n in range(1, deep + 1) for who in ("ann", "bob")]
    refused(trees.folders(tmp_path / "b", below + loose[3 * deep :]), "cam1", path=tmp_path / "b")
    half = ["north/ann/1.jpg", "north/bob/1.jpg", "south/1.jpg"]
    refused(trees.folders(tmp_path / "c", half), "north", path=tmp_path / "c", problem="folders of images")


def test_names_of_files_that_contradict_their_folders_are_refused(tmp_path):
    scenes = [f"scene{n}/{who}_c{n}s1_000000_00.jpg" for n in (1, 2) for who in ("0201", "0202")]
    trees.folders(tmp_path / "a", scenes)
    refused(tmp_path / "a", "0201", "market1501", "folder:identity", path=tmp_path / "a", problem="2 folders")
    assert len(read_dataset("folder:identity", tmp_path / "a").train) == 4
    trees.folders(tmp_path / "b", [f"{who}/{who}_c{n}s1_000000_00.jpg" for n in (1, 2) for who in ("0201", "0202")])
    trees.folders(tmp_path / "b", ["ann/0203_c1s1_000000_00.jpg", "ann/0204_c1s1_000000_00.jpg"])
    assert len(read_dataset("folder", tmp_path / "b").train) == 6
    trees.folders(tmp_path / "c", [f"{who}/{frame}_c1.jpg" for who in ("ann", "bob") for frame in ("0001", "0002")])
    assert len(read_dataset("folder", tmp_path / "c").train) == 4


def test_junk_is_junk_at_every_level_of_identities(tmp_path):
    trees.folders(tmp_path, ["day1/7/1.jpg", "day1/8/1.jpg", "day1/-1/1.jpg", "-1/7/1.jpg"])
    assert ids(read_dataset("folder:identity/identity", tmp_path).train) == [(1, -1), (2, -1)]


def test_a_layout_is_part_of_the_name_and_goes_where_it_goes(tmp_path):
    spec = dataset_spec("folder:camera/identity")
    assert (spec.name, spec.layout, spec.levels) == ("folder:camera/identity", "folder", ("camera", "identity"))
    assert resolve_dataset(tmp_path / "any.onnx", spec.name, str(tmp_path)) == (spec.name, str(tmp_path))


@pytest.mark.parametrize("layout", ["", "camera", "camera/", "/identity", "camera/identity/camera", "person/identity"])
def test_layouts_that_cannot_be(layout):
    with refuses(InvalidValue, "folder:camera/identity", name="--dataset", value=f"folder:{layout}"):
        dataset_spec(f"folder:{layout}")
    with refuses(InvalidValue, hint="did you mean camera?"):
        dataset_spec("folder:camra/identity")


NAMES = st.lists(st.sampled_from(["cam1", "cam2", "a", "b", "-1", "7"]), min_size=1, max_size=4).map(tuple)


@examples(100)
@given(NAMES, st.lists(st.sampled_from(LEVELS), max_size=3).map(lambda levels: (*levels, "identity")))
def test_every_folder_of_a_fitting_image_has_one_meaning(names, levels):
    if fits(names, levels):
        said = [at_level(names, levels, level).split("/") for level in dict.fromkeys(levels)]
        assert sorted(name for each in said for name in each) == sorted(names)
    assert fits(names, (*levels, "any")) == (len(names) >= len(levels))


@examples(100)
@given(st.lists(NAMES, max_size=8))
def test_folders_are_of_images_or_of_folders(images):
    plain, deeper = mostly_deeper(images)
    assert sorted(plain + deeper) == sorted({names[0] for names in images} - {str(JUNK)})
    assert all(any(len(names) > 1 for names in images if names[0] == name) for name in deeper)


@examples(100)
@given(st.lists(st.text("cam12 /é-", max_size=5), min_size=1))
def test_cameras_of_two_names_have_two_numbers(names):
    numbers = numbered_cameras(names)
    assert set(numbers) == set(names)
    assert len(set(numbers.values())) == len(numbers)


def test_cameras_keep_their_numbers_if_each_has_one():
    assert numbered_cameras(["cam7", "cam2", "cam7"]) == {"cam7": 7, "cam2": 2}
    assert numbered_cameras(["cam7", "hall"]) == {"cam7": 1, "hall": 2}
    assert numbered_cameras(["cam1", "c1"]) == {"c1": 1, "cam1": 2}
    assert numbered_cameras(["cam1", "Cam01", "cam10"]) == {"cam1": 1, "Cam01": 1, "cam10": 10}
    assert numbered_cameras(["hall", "Hall", "0", "00"]) == {"hall": 2, "Hall": 2, "0": 1, "00": 1}
