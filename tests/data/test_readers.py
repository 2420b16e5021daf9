import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.data import folders, market, msmt17
from pmm.data.crops import load_crop
from pmm.data.dataset_specs import ALIASES, DATASETS
from pmm.data.readers import read_dataset, scan
from pmm.data.samples import class_indices
from pmm.presets import preset
from pmm.training.data_setup import resolve_config, training_data
from pmm.utils.errors import InvalidFile, InvalidValue, printable
from tests.data import trees
from tests.refusals import refuses

MARKET_LIKE = {
    "market1501": trees.MARKET,
    "dukemtmc-reid": trees.DUKE,
    "cuhk03-np-labeled": trees.CUHK,
    "cuhk03-np-detected": trees.CUHK,
}
PLACES = {
    "market1501": ["", "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"],
    "dukemtmc-reid": ["", "dukemtmc-reid", "DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID"],
    "cuhk03-np-labeled": ["", "cuhk03-np/labeled", "labeled", "cuhk03-np-labeled", "cuhk-label"],
    "cuhk03-np-detected": ["", "cuhk03-np/detected", "detected", "cuhk03-np-detected", "cuhk-detect"],
    "msmt17-v1": ["", "msmt17-v1", "MSMT17_V1", "msmt17/MSMT17_V1"],
    "msmt17-v2": ["", "msmt17-v2", "MSMT17_V2", "msmt17/MSMT17_V2"],
}


def tree(name, root):
    return trees.msmt17(root, name) if name.startswith("msmt17") else trees.three_folders(root, MARKET_LIKE[name])


def ids(samples):
    return [(sample.pid, sample.camid) for sample in samples]


def refusal(name, root, *facts, **attributes):
    """The error with which `root` is refused; its line suits every terminal."""
    with refuses(InvalidFile, *facts, **attributes) as caught:
        read_dataset(name, root)
    str(caught.value).encode()
    return caught.value


@pytest.mark.parametrize(("name", "below"), [(n, place) for n, places in PLACES.items() for place in places])
def test_every_place_of_every_data_set(tmp_path, name, below):
    tree(name, tmp_path / below)
    split = read_dataset(name, tmp_path)
    for part in (split.train, split.query, split.gallery):
        assert part
        assert all(sample.path.is_file() and sample.path.is_relative_to(tmp_path / below) for sample in part)
    assert split.notes == ()


def test_the_place_nearest_to_the_root_comes_first(tmp_path):
    for below in PLACES["market1501"][1:]:
        trees.three_folders(tmp_path / below)
    assert read_dataset("market1501", tmp_path).query[0].path.parent == tmp_path / "market1501/query"
    trees.three_folders(tmp_path)
    assert read_dataset("market1501", tmp_path).query[0].path.parent == tmp_path / "query"


def test_market(tmp_path):
    split = read_dataset("market1501", trees.three_folders(tmp_path))
    assert ids(split.train) == [(2, 0), (2, 2), (7, 5)]
    assert ids(split.query) == [(1, 0)]
    assert sorted(ids(split.gallery)) == [(0, 1), (1, 0), (1, 1)]
    assert class_indices(split.train) == {2: 0, 7: 1}


def test_duke_and_cuhk(tmp_path):
    duke = read_dataset("dukemtmc-reid", trees.three_folders(tmp_path / "a", trees.DUKE))
    assert (ids(duke.train), ids(duke.query)) == ([(1, 1), (1, 7), (3, 0)], [(5, 1)])
    assert ids(duke.gallery) == [(2, 0), (5, 4)]
    cuhk = read_dataset("cuhk03-np-detected", trees.three_folders(tmp_path / "b", trees.CUHK))
    assert (ids(cuhk.train), ids(cuhk.gallery)) == ([(1, 0), (1, 1), (2, 0)], [(3, 1), (4, 0)])


@pytest.mark.parametrize("name", ["msmt17-v1", "msmt17-v2"])
def test_msmt17(tmp_path, name):
    split = read_dataset(name, trees.msmt17(tmp_path, name))
    assert ids(split.train) == [(0, 0), (1, 14), (0, 2)]  # list_train, then list_val
    assert ids(split.query) == [(0, 4), (1, 6)]  # identity 0 is somebody
    assert ids(split.gallery) == [(0, 5), (1, 6)]
    assert split.train[0].path == tmp_path / trees.MSMT17_FOLDERS[name][0] / trees.MSMT17["train"][0]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("market", "market1501"),
        ("dukemtmc", "dukemtmc-reid"),
        ("cuhk-label", "cuhk03-np-labeled"),
        ("cuhk-detect", "cuhk03-np-detected"),
    ],
)
def test_aliases(tmp_path, alias, name):
    tree(name, tmp_path)
    assert read_dataset(alias, tmp_path) == read_dataset(name, tmp_path)
    assert scan(alias, tmp_path).spec.name == name
    assert set(ALIASES.values()) < set(DATASETS)


def test_synthetic_people_are_read_by_the_same_reader(people):
    assert read_dataset("synthetic", people) == read_dataset("market1501", people)


def test_only_the_file_name_is_parsed(tmp_path):
    root = trees.three_folders(tmp_path / "0099_c9_misleading")
    assert {s.pid for s in read_dataset("market1501", root).train} == {2, 7}


def test_missing_folder_wrong_layout_and_empty_parts(tmp_path):
    refusal("market1501", tmp_path / "nowhere", path=tmp_path / "nowhere", problem="folder", expected="market1501")
    refusal("market1501", tmp_path, "nothing", path=tmp_path)
    (tmp_path / "bounding_box_train").mkdir()
    (tmp_path / "readme.txt").write_text("")
    error = refusal("market1501", tmp_path, "bounding_box_train/, readme.txt", path=tmp_path, problem="market1501")
    assert error.expected == "the folders bounding_box_train, query, bounding_box_test"
    assert error.hint == f"{tmp_path} has no query/, bounding_box_test/"
    trees.three_folders(tmp_path / "market1501")
    shutil.rmtree(tmp_path / "market1501/query")
    (tmp_path / "market1501/query").mkdir()
    trees.draw(tmp_path / "market1501/query/-1_c1s1_000401_00.jpg")
    error = refusal("market1501", tmp_path, "usable image", path=tmp_path / "market1501/query")
    assert "0002_c1s1_000451_03.jpg" in error.problem
    with refuses(InvalidValue, *DATASETS, name="--dataset", value="cuhk"):
        read_dataset("cuhk", tmp_path)


@pytest.mark.parametrize(
    ("present", "asked", "advice"),
    [
        ("MSMT17_V1", "market1501", "--dataset msmt17-v1"),
        ("MSMT17_V1", "msmt17-v2", "--dataset msmt17-v1"),
        ("MSMT17_V2", "folder", "--dataset msmt17-v2"),
        ("DukeMTMC-reID", "market1501", "--dataset dukemtmc-reid"),
        ("detected", "cuhk-label", "--dataset cuhk03-np-detected"),
        ("market1501", "folder", "--dataset market1501"),
        ("", "msmt17-v1", "--dataset market1501 or dukemtmc-reid or cuhk03-np-labeled or cuhk03-np-detected"),
        ("", "folder", "--dataset market1501 or dukemtmc-reid or cuhk03-np-labeled or cuhk03-np-detected"),
        ("people", "market1501", "--dataset folder"),
    ],
)
def test_another_layout_is_named(tmp_path, present, asked, advice):
    if present == "people":
        trees.folders(tmp_path, ["ann/1.jpg", "bob/1.jpg"])
    elif present.startswith("MSMT17"):
        trees.msmt17(tmp_path / present, present.lower().replace("_", "-"))
    else:
        trees.three_folders(tmp_path / present)
    error = refusal(asked, tmp_path, path=tmp_path, problem="does not have the layout of")
    assert error.hint == f"it looks like {advice}"


def test_a_data_set_elsewhere_is_found(tmp_path):
    root = tmp_path / "mine"
    trees.three_folders(root / "a/b/c")
    refusal("market1501", root, hint=f"--root {root}/a/b/c, ")
    refusal("market1501", root / "a/b/c/query", hint=f"--root {root}/a/b/c, ")
    trees.msmt17(tmp_path / "MSMT17_V1")
    refusal("msmt17-v1", tmp_path / "MSMT17_V1/train", hint=f"--root {tmp_path}/MSMT17_V1, ")
    trees.three_folders(tmp_path / "other/DukeMTMC-reID", trees.DUKE)
    assert "--root" not in refusal("market1501", tmp_path / "other").hint
    trees.folders(tmp_path / "own", [f"{part}/ann/1.jpg" for part in folders.PARTS[:3]])
    assert "--root" not in refusal("market1501", tmp_path / "own").hint


def test_folders_in_capitals_are_to_be_renamed_and_no_folders_of_people(tmp_path):
    trees.three_folders(tmp_path)
    (tmp_path / "query").rename(tmp_path / "Query")
    (tmp_path / "bounding_box_test").rename(tmp_path / "Bounding_box_test")
    advice = f"rename {tmp_path}/Bounding_box_test to bounding_box_test, {tmp_path}/Query to query"
    assert refusal("market1501", tmp_path).hint == advice
    trees.folders(tmp_path / "own", [f"{part}/ann/1.jpg" for part in ("Train", "Query", "gallery")])
    advice = f"rename {tmp_path}/own/Query to query, {tmp_path}/own/Train to train"
    assert refusal("folder", tmp_path / "own").hint == advice


def test_an_archive_is_to_be_unpacked(tmp_path):
    archive = tmp_path / "Market-1501-v15.09.15.zip"
    archive.write_bytes(b"PK")
    refusal("market1501", tmp_path, path=tmp_path, problem=archive.name, hint=f"unpack {archive.name} ")
    refusal("market1501", archive, path=archive, problem="archive", hint="unpack it")


def test_a_folder_named_after_another_data_set_is_noted(tmp_path):
    root = trees.three_folders(tmp_path / "detected", trees.CUHK)
    assert read_dataset("cuhk03-np-detected", root).notes == ()
    note = "a folder named detected usually holds cuhk03-np-detected, not cuhk03-np-labeled"
    assert read_dataset("cuhk03-np-labeled", root).notes == (note,)
    assert read_dataset("synthetic", root).notes == ()


def test_a_root_too_high_is_no_folder_of_one_person(tmp_path):
    trees.folders(
        tmp_path, [f"mine/deep/{part}/{who}/{n}.jpg" for part in ("train", "Query") for who in "ab" for n in "12"]
    )
    error = refusal("folder", tmp_path, f"--root {tmp_path}/mine/deep, ", problem="below an identity")
    assert error.path in (tmp_path / "mine/deep/Query", tmp_path / "mine/deep/train")


@pytest.mark.parametrize("name", ["market1501", "folder"])
def test_images_of_more_kinds_are_read_and_of_others_refused(tmp_path, name):
    if name == "folder":
        below = trees.folders(tmp_path, [f"{who}/{n}_c{n}.jpg" for who in ("ann", "bob") for n in "123"]) / "ann"
    else:
        below = trees.three_folders(tmp_path) / "query"
    before = read_dataset(name, tmp_path)
    more = [trees.draw(below / f"0001_c3_{suffix[1:]}{suffix}") for suffix in (".webp", ".tif", ".tiff")]
    after = read_dataset(name, tmp_path)
    assert len(after.query) + len(after.gallery) == len(before.query) + len(before.gallery) + 3
    for file in more:
        assert load_crop(file, 32, 16).std() > 0
        file.unlink()
    assert read_dataset(name, tmp_path) == before
    for suffix in (".gif", ".HEIC"):
        (below / f"0001_c4{suffix}").write_bytes(b"x")
        refusal(name, tmp_path, suffix.lower(), ".jpg, .jpeg, .png, ", path=below / f"0001_c4{suffix}")
        (below / f"0001_c4{suffix}").rename(below / f".0001_c4{suffix}")
        assert read_dataset(name, tmp_path) == before


def test_images_a_level_too_deep_are_not_left_out(tmp_path):
    trees.three_folders(tmp_path)
    trees.draw(tmp_path / "query/query/0001_c3s1_000001_00.jpg")
    refusal("market1501", tmp_path, "move them", path=tmp_path / "query/query", problem="folder of images")


def test_an_incomplete_layout_is_not_taken_for_folders_of_people(tmp_path):
    trees.three_folders(tmp_path)
    shutil.rmtree(tmp_path / "query")
    refusal("market1501", tmp_path, "bounding_box_test/, bounding_box_train/", hint=f"{tmp_path} has no query/")
    refusal("folder", tmp_path, path=tmp_path, expected="one folder of crops per identity")
    trees.msmt17(tmp_path / "MSMT17_V1")
    (tmp_path / "MSMT17_V1/list_val.txt").unlink()
    refusal("msmt17-v1", tmp_path, path=tmp_path, hint=f"{tmp_path}/MSMT17_V1 has no list_val.txt")


@pytest.mark.parametrize(
    "name",
    [
        "person.jpg",
        "12-3_c1.jpg",
        "0001_c0s1.jpg",
        "-5_c1s1.jpg",
        "--1_c1.jpg",
        "1234567890_c1.jpg",
        "1_c12345.jpg",
        "\u0661_c1.jpg",
    ],
)
def test_odd_names_are_refused(tmp_path, name):
    trees.three_folders(tmp_path)
    trees.draw(tmp_path / "query" / name)
    refusal("market1501", tmp_path, "0002_", path=tmp_path / "query" / name, problem="identity and camera")


def test_the_first_problem_is_told_and_the_others_counted(tmp_path):
    trees.three_folders(tmp_path)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        trees.draw(tmp_path / "bounding_box_train" / name)
    (tmp_path / "query" / "x.jpg").mkdir()
    error = refusal("market1501", tmp_path, path=tmp_path / "bounding_box_train/a.jpg", problem="identity")
    assert error.problem.endswith("(and 2 more like this and 1 other problem)")
    assert error.hint == "pmm check lists all"


def test_hidden_files_and_what_is_no_image_are_skipped(tmp_path):
    trees.three_folders(tmp_path)
    before = read_dataset("market1501", tmp_path)
    for name in (".DS_Store", "._0001_c1s1_001051_00.jpg", "Thumbs.db", "readme.txt"):
        (tmp_path / "query" / name).write_text("x")
    (tmp_path / "query" / "more").mkdir()
    (tmp_path / "query" / "round").symlink_to("round")
    assert read_dataset("market1501", tmp_path) == before
    assert len(scan("market1501", tmp_path).skipped) == 7


def test_suffixes_of_any_case_and_links_to_images(tmp_path):
    trees.three_folders(tmp_path)
    trees.draw(tmp_path / "query" / "0001_c3_big.JPG")
    (tmp_path / "query" / "0001_c4_link.jpg").symlink_to(tmp_path / "query" / "0001_c3_big.JPG")
    assert ids(read_dataset("market1501", tmp_path).query) == [(1, 0), (1, 2), (1, 3)]


def test_what_is_no_file_is_refused(tmp_path):
    def refused(plant, problem):
        root = tmp_path / "data"
        trees.three_folders(root)
        plant(root / "query" / "0009_c1_x.jpg")
        refusal("market1501", root, path=root / "query/0009_c1_x.jpg", problem=problem)
        shutil.rmtree(root)

    refused(lambda path: path.symlink_to("nowhere.jpg"), "link to nothing")
    refused(Path.mkdir, "folder")
    refused(lambda path: path.symlink_to(path.name), "not accessible (")
    refused(os.mkfifo, "regular file")


def test_a_name_that_is_no_text_is_printed_escaped(tmp_path):
    trees.three_folders(tmp_path)
    shutil.copy(tmp_path / "query" / "0001_c1s1_001051_00.jpg", os.fsencode(tmp_path / "query") + b"/0001_c2_\xff.jpg")
    refusal("market1501", tmp_path, "rename", "UTF-8", r"0001_c2_\xff.jpg", path=tmp_path / "query/0001_c2_\udcff.jpg")
    assert printable("a\nb\udcffé") == "a\\nb\\xffé"


def test_two_files_of_one_stem_are_refused(tmp_path):
    trees.three_folders(tmp_path)
    trees.draw(tmp_path / "query" / "0001_c1s1_001051_00.png")
    png = tmp_path / "query" / "0001_c1s1_001051_00.png"
    refusal("market1501", tmp_path, f"{png.stem}.jpg", path=png, problem="duplicate")


@given(st.one_of(st.just(-1), st.integers(0, 10**9 - 1)), st.integers(1, 9999), st.integers(0, 4))
def test_market_names_give_back_identity_and_camera(pid, camera, zeros):
    digits = str(pid) if pid < 0 else str(pid).zfill(min(zeros, 4))
    for tail in (".jpg", "s1_000451_03.jpg", "_f0046182.jpg", "_c9_12.png"):
        assert market.parse_name(f"{digits}_c{camera}{tail}") == (pid, camera - 1)


@given(st.text(max_size=20))
def test_no_market_name_is_parsed_into_nonsense(name):
    parsed = market.parse_name(name)
    assert parsed is None or (parsed[0] >= -1 and parsed[1] >= 0 and f"_c{parsed[1] + 1}" in name.replace("_c0", "_c"))


MSMT_NAME = "0000_000_05_0302morning_0092_1.jpg"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0000/{name}", "not a line of 'path pid'; found '0000/{name}'"),
        ("0000/{name} zero", "not a line of 'path pid'"),
        ("0000/{name} -1", "not a line of 'path pid'"),
        ("0000/{name} 1234567890", "not a line of 'path pid'"),
        ("0000/list.txt 0", "not a line of 'path pid'; found '0000/list.txt 0'"),
        ("0", "not a line of 'path pid'; found '0'"),
        ("0000/\x07{name} 0", r"not a line of 'path pid'; found '0000/\x07"),
        ("/0000/{name} 0", "a path that leaves the folder; found '/0000/{name}', expected a path below"),
        ("../test/0000/{name} 0", "a path that leaves the folder"),
        ("0000/../0000/{name} 0", "a path that leaves the folder"),
        ("..\\\\0000/{name} 0", "a path with \\; found '..\\\\0000/{name}', expected /"),
        ("./../0000/{name} 0", "a path that leaves the folder"),
        ("./0000/{name} 0", "the same file twice; '0000/{name}' is named by list_query.txt:1 already"),
        ("test/0000/{name} 0", "a path that is not relative to its folder; found 'test/0000/{name}', expected it with"),
        ("test/0000/9{name} 0", "a file that is missing; 'test/0000/9{name}' is not in"),
        ("0000//{name} 0", "a path that leaves the folder"),
        ("0000/9999_{name} 0", "a file that is missing; '0000/9999_{name}' is not in"),
        ("nowhere/{name} 0", "a file that is missing; 'nowhere/{name}' is not in"),
        ("0000/{long}.jpg 0", "a file that is missing"),
        ("0000/{name} 0", "the same file twice; '0000/{name}' is named by list_query.txt:1 already"),
        ("0000/0000_000_05_0302morning_0092_1.png 0", "duplicate names; '0000/0000_000_05_0302morning_0092_1.png'"),
    ],
)
def test_lines_of_a_list_are_not_trusted(tmp_path, line, expected):
    trees.msmt17(tmp_path)
    line, expected = (text.replace("{name}", MSMT_NAME).replace("{long}", "x" * 300) for text in (line, expected))
    with (tmp_path / "list_gallery.txt").open("a") as file:
        file.write(f"\n  \n{line}\n")
    error = refusal("msmt17-v1", tmp_path, path=tmp_path / "list_gallery.txt", problem="line 5: ")
    assert error.problem.removeprefix("line 5: ").startswith(expected)


def test_bytes_of_a_list_and_cameras_in_its_names(tmp_path):
    trees.msmt17(tmp_path)
    whole = (tmp_path / "list_val.txt").read_bytes()
    (tmp_path / "list_val.txt").write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n"))
    assert len(read_dataset("msmt17-v1", tmp_path).train) == 3
    (tmp_path / "list_val.txt").write_bytes(whole + b"0000/\xff.jpg 0\n")
    lists = {name: tmp_path / f"list_{name}.txt" for name in ("train", "val")}
    refusal("msmt17-v1", tmp_path, r"'0000/\xff.jpg 0'", "UTF-8", path=lists["val"], problem="line 2")
    trees.draw(tmp_path / "train/0000/0000_000_00_a_b.jpg")
    (tmp_path / "list_val.txt").write_bytes(whole + b"0000/0000_000_00_a_b.jpg 0\n")
    refusal("msmt17-v1", tmp_path, "'0000/0000_000_00_a_b.jpg'", "line 2", path=lists["val"], problem="camera")
    (tmp_path / "list_train.txt").write_text("")
    (tmp_path / "list_val.txt").write_text("")
    refusal("msmt17-v1", tmp_path, "expected lines like", path=lists["train"], problem="usable image")


def test_missing_files_are_counted_and_links_are_fine(tmp_path):
    trees.msmt17(tmp_path)
    for name in trees.MSMT17["gallery"]:
        (tmp_path / "test" / name).unlink()
    error = refusal("msmt17-v1", tmp_path, "line 1", path=tmp_path / "list_gallery.txt", problem="missing")
    assert f"; '{trees.MSMT17['gallery'][0]}'" in error.problem
    assert error.problem.endswith("(and 1 more like this and 1 other problem)")
    for name in trees.MSMT17["gallery"]:
        (tmp_path / "test" / name).symlink_to(tmp_path / "test" / trees.MSMT17["query"][0])
    assert len(read_dataset("msmt17-v1", tmp_path).gallery) == 2
    (tmp_path / "test" / trees.MSMT17["query"][1]).unlink()
    (tmp_path / "test" / trees.MSMT17["query"][1]).symlink_to("nowhere")
    refusal("msmt17-v1", tmp_path, "line 2", path=tmp_path / "list_query.txt", problem="link to nothing")


PATHS = st.lists(st.text("abc01 _-é", min_size=1, max_size=6), min_size=1, max_size=3).map("/".join)


@given(PATHS.filter(lambda p: p == p.strip()), st.integers(0, 10**9 - 1), st.sampled_from([" ", "  ", "\t"]))
def test_lines_of_a_list_give_back_path_and_identity(path, pid, between):
    assert msmt17.parse_line(f"{path}.jpg{between}{pid:04}\r") == (f"{path}.jpg", pid)


@given(st.text(max_size=30))
def test_no_listed_path_gets_out_of_its_folder(path):
    if not msmt17.leaves_folder(path):
        inside = Path(os.path.normpath(Path("/data") / path))
        assert inside.is_relative_to("/data")
        assert inside != Path("/data")


@given(st.integers(1, 9999), st.sampled_from(["0303morning_0015_0.jpg", "a.png"]))
def test_msmt17_names_give_back_the_camera(camera, tail):
    assert msmt17.camera_of_msmt17(f"0000_000_{camera:02}_{tail}") == camera - 1
    assert msmt17.camera_of_msmt17(f"0000_000_{camera:02}") is None


@given(st.integers(0, 10**9 - 1), st.sampled_from(["c", "C", "cam", "CAM"]), st.sampled_from(["", "x_", "12_cat_"]))
def test_the_camera_in_a_name_of_ones_own(camera, word, before):
    for tail in (".jpg", "_7.jpg", "s1_c9.jpg", "-c9.jpg"):
        assert folders.camera_of_crop(f"{before}{word}{camera}{tail}") == camera


@pytest.mark.parametrize("name", ["1.jpg", "ac1.jpg", "cam.jpg", "c_1.jpg", "cat1.jpg", "abc12.jpg"])
def test_names_without_a_camera(name):
    assert folders.camera_of_crop(name) is None


def test_folders_of_train_query_and_gallery(tmp_path):
    trees.folders(tmp_path, ["train/dan/c1_1.jpg", "train/dan/c2_1.jpg", "train/-1/c1_1.jpg", "query/ann/x_cam0_1.jpg"])
    trees.folders(
        tmp_path, ["gallery/ann/c7_1.jpg", "gallery/bob/C2_1.jpg", "gallery/-1/c3_1.jpg", "gallery/ann/0_c0.jpg"]
    )
    (tmp_path / "gallery" / ".hidden").mkdir()
    (tmp_path / "gallery" / "notes.txt").write_text("")
    (tmp_path / "gallery" / "ann" / "round").symlink_to("round")
    (tmp_path / "round").symlink_to("round")
    split = read_dataset("folder", tmp_path)
    assert ids(split.train) == [(3, 1), (3, 2)]  # ann 1, bob 2, dan 3
    assert ids(split.query) == [(1, 0)]
    assert ids(split.gallery) == [(1, 0), (1, 7), (2, 2)]
    assert split.notes == ()
    shutil.rmtree(tmp_path / "train")
    split = read_dataset("folder", tmp_path)
    assert (split.train, split.notes) == ((), (folders.NO_TRAIN,))


def test_folders_of_train_and_test(tmp_path):
    trees.folders(tmp_path, ["train/9/c1.jpg", "test/-1/c1.jpg"])
    trees.folders(tmp_path, [f"test/{p}/c{c}_{i}.jpg" for p in (10, 2) for c in (1, 2) for i in (1, 2)])
    split = read_dataset("folder", tmp_path)
    assert ids(split.train) == [(3, 1)]  # 10, 2, 9: names are sorted as names
    assert [sample.path.name for sample in split.query] == ["c1_1.jpg", "c2_1.jpg"] * 2
    assert ids(split.query) == ids(split.gallery) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert split.notes == (
        "query and gallery are drawn from test: the first crop of each identity and camera is query",
    )


def test_one_pool_of_folders(tmp_path):
    trees.folders(
        tmp_path, ["ann/a/c1_1.jpg", "ann/a/c2_1.jpg", "ann/b/c1_2.jpg", "bob/c1.jpg", "cem/c1.jpg", "-1/c1.jpg"]
    )
    split = read_dataset("folder", tmp_path)
    assert ids(split.train) == [(1, 1), (1, 2), (1, 1), (2, 1), (3, 1)]  # by path, however deep
    assert ids(split.query) == [(1, 1), (1, 2), (2, 1), (3, 1)]
    assert [sample.path for sample in split.gallery] == [tmp_path / "ann/b/c1_2.jpg"]
    deeper = "folders below those of identities say nothing, no camera either: in ann"
    people = folders.IDENTITIES.format("ann, bob, cem")
    assert split.notes == (people, folders.DRAWN.format("all crops", "identity and camera"), folders.SHARED, deeper)


def test_hidden_folders_are_nobody(tmp_path):
    trees.folders(tmp_path, [".cache/1.jpg", "1.jpg"])
    refusal("folder", tmp_path, path=tmp_path, problem=".cache/, 1.jpg")
    (tmp_path / "1.jpg").unlink()
    trees.folders(tmp_path, ["ann/.trash/c1.jpg", "ann/c1.jpg"])
    assert len(read_dataset("folder", tmp_path).train) == 1


def test_folders_without_cameras(tmp_path):
    pool = trees.folders(tmp_path / "pool", ["ann/1.jpg", "ann/2.jpg", "ann/3.jpg", "bob/1.jpg", "bob/2.jpg"])
    split = read_dataset("folder", pool)
    assert ids(split.train) == [(1, -1)] * 3 + [(2, -1)] * 2
    assert ids(split.query) == [(1, 0), (2, 0)]
    assert ids(split.gallery) == [(1, 1), (1, 1), (2, 1)]
    drawn = folders.DRAWN.format("all crops", "identity")
    assert split.notes == ("identities are the folders ann, bob", drawn, folders.SHARED, folders.NO_CAMERAS)
    given = trees.folders(tmp_path / "given", ["query/ann/1.jpg", "query/ann/2.jpg", "gallery/ann/1.jpg"])
    split = read_dataset("folder", given)
    assert (ids(split.query), ids(split.gallery)) == ([(1, 0), (1, 0)], [(1, 1)])
    assert folders.NO_CAMERAS in split.notes


def test_cameras_of_some_files_only_are_refused(tmp_path):
    trees.folders(tmp_path, ["ann/c1_1.jpg", "ann/2.jpg", "bob/3.jpg"])
    error = refusal("folder", tmp_path, "ann/c1_1.jpg has one", "camera", path=tmp_path / "ann/2.jpg")
    assert error.problem.endswith("(and 1 more like this)")


def test_what_is_wrong_with_folders(tmp_path):
    root = trees.folders(tmp_path, ["train/ann/1.jpg", "test/bob/1.jpg", "test/bob/2.jpg"])
    trees.draw(root / "test" / "stray.jpg")
    refusal("folder", root, path=root / "test/stray.jpg", problem="identity folder")
    (root / "test" / "stray.jpg").unlink()
    (root / "test" / "bob" / "round").symlink_to(root / "test")
    refusal("folder", root, path=root / "test/bob/round", problem="linked folder")
    (root / "test" / "bob" / "round").unlink()
    (root / "test" / "bob" / "lost.jpg").symlink_to("nowhere")
    refusal("folder", root, path=root / "test/bob/lost.jpg", problem="link to nothing")
    (root / "test" / "bob" / "lost.jpg").rename(root / "test" / "gone")
    refusal("folder", root, "folder", path=root / "test/gone", problem="link to nothing")
    (root / "test" / "gone").unlink()
    os.mkdir(os.fsencode(root) + b"/test/\xfe")
    refusal("folder", root, "rename the folder", "UTF-8", r"test/\xfe", path=root / "test/\udcfe")
    os.rmdir(os.fsencode(root) + b"/test/\xfe")
    (root / "test" / "cem").symlink_to(root / "train" / "ann")  # an identity's folder may be a link
    assert {sample.pid for sample in read_dataset("folder", root).query} == {2, 3}
    shutil.rmtree(root / "train" / "ann")
    (root / "test" / "cem").unlink()
    refusal("folder", root, path=root / "train", problem="usable image")
    (root / "gallery").mkdir()
    shutil.rmtree(root / "test")
    refusal("folder", root, path=root, expected="train/, query/ and gallery/ with one folder")


def test_what_lies_beside_the_parts_is_told(tmp_path):
    trees.folders(tmp_path, ["train/ann/1.jpg", "test/bob/1.jpg", "test/bob/2.jpg"])
    assert not any("beside" in note for note in read_dataset("folder", tmp_path).notes)
    trees.folders(tmp_path, ["val/cem/1.jpg", "loose.jpg"])
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "readme.txt").write_text("")
    split = read_dataset("folder", tmp_path)
    assert folders.BESIDE.format("a.heic, loose.jpg, val/", "train, test") in split.notes
    assert ["readme.txt" in line for line in split.left_out] == [True]
    assert [sample.path.name for sample in split.train] == ["1.jpg"]


def test_people_without_images_are_named(tmp_path):
    trees.folders(tmp_path, ["ann/1.jpg", "bob/1.jpg"])
    (tmp_path / "cem/below").mkdir(parents=True)
    (tmp_path / "cem/video.mp4").write_bytes(b"x")
    assert any("cem" in line and "without images" in line for line in read_dataset("folder", tmp_path).left_out)


def test_training_without_a_train_folder_and_with_an_alias(tmp_path):
    def config(dataset, root):
        base = preset("tiny")
        return resolve_config(type(base)(data=type(base.data)(dataset=dataset, root=str(root), val_identities=0.5)))

    assert config("market", tmp_path).data.dataset == "market1501"
    with refuses(InvalidValue, *DATASETS, name="--dataset", value="markt", hint="market1501"):
        config("markt", tmp_path)
    given = trees.folders(tmp_path / "given", ["query/ann/1.jpg", "gallery/ann/1.jpg"])
    with refuses(InvalidFile, "nothing to train on", path=given, expected="a folder train"):
        training_data(config("folder", given))
    pool = trees.folders(tmp_path / "pool", [f"{p}/{i}.jpg" for p in range(4) for i in range(3)])
    resolved, split = training_data(config("folder", pool))
    assert resolved.model.num_classes == 2
    assert (len(split.train), len(split.query), len(split.gallery)) == (6, 2, 4)
    assert folders.NO_CAMERAS in split.notes


def test_a_folder_is_listed_once_however_many_images_it_holds(tmp_path, monkeypatch):
    trees.msmt17(tmp_path)
    names = [f"0000/0000_{index:03}_01_0303noon_0001_0.jpg" for index in range(1, 200)]
    for name in names:
        (tmp_path / "train" / name).touch()
    with (tmp_path / "list_val.txt").open("a") as file:
        file.writelines(f"{name} 0\n" for name in names)
    calls = []

    def counted(call):
        return lambda *args, **more: calls.append(args) or call(*args, **more)

    for name in ("scandir", "stat", "lstat"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    assert len(read_dataset("msmt17-v1", tmp_path).train) == 202
    assert 4 <= len(calls) <= 40


def test_a_root_that_is_missing_or_closed_says_what_is_there(tmp_path, monkeypatch):
    trees.three_folders(tmp_path / "market1501")
    refusal(
        "market1501", tmp_path / "markt1501/query", path=tmp_path / "markt1501/query", hint=f"{tmp_path}/market1501?"
    )
    refusal("market1501", tmp_path / "x", path=tmp_path / "x", hint=f"{tmp_path} is there")
    image = tmp_path / "market1501/query" / trees.MARKET["query"][0]
    refusal("market1501", image, path=image, problem="not a folder", hint=f"{tmp_path}/market1501/query")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    refusal("market1501", tmp_path, path=tmp_path, problem="permission", hint="permissions")


@pytest.mark.parametrize("layout", ["folder", "folder:identity"])
def test_a_folder_of_people_that_cannot_be_read_is_a_problem(tmp_path, monkeypatch, layout):
    trees.folders(tmp_path, ["ann/1.jpg", "bob/1.jpg", "closed/1.jpg"])
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refusal(layout, tmp_path, "Permission denied", path=tmp_path / "closed", problem="a folder that cannot be read")
