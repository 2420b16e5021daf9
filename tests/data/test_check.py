import json
import os
import shutil

import pytest
from PIL import Image

from pmm.data import check, counts, dataset_specs, images
from pmm.data.check import lines
from pmm.data.folders import NO_CAMERAS, NO_TRAIN, SHARED
from pmm.data.images import inspect_image
from tests.conftest import assert_one_line_error, run_here, run_without_torch
from tests.data import trees

HEALTHY = {
    "bounding_box_train": ["0003_c1s1_1.jpg", "0003_c2s1_1.jpg", "0004_c1s1_1.jpg", "0004_c2s1_1.jpg"],
    "query": ["0001_c1s1_1.jpg", "0002_c1s1_1.jpg"],
    "bounding_box_test": ["-1_c1s1_1.jpg", "0000_c1s1_1.jpg", "0001_c2s1_1.jpg", "0002_c2s1_1.jpg", "0002_c2s1_2.jpg"],
}


@pytest.fixture
def root(tmp_path):
    """Nothing is wrong with it."""
    return trees.three_folders(tmp_path / "data", HEALTHY)


def report_of(root, dataset="synthetic"):
    """The report, which is the same for one thread and for more."""
    report = check.check(dataset, root, threads=2)
    assert report == check.check(dataset, root, threads=1)
    return report


def finding(root, kind, dataset="synthetic"):
    """The one finding of `kind`, the only one there is but for notes; and its line."""
    report = report_of(root, dataset)
    (found,) = [f for f in report.findings if f.kind == kind]
    assert {f.kind for f in report.findings if f.level != "note"} <= {kind}
    (line,) = [line for line in lines(report) if found.text in line]
    assert line.startswith(found.level)
    assert report.usable == (found.level != "problem")
    return found, line


def test_nothing_is_wrong(root):
    report = report_of(root)
    assert report.findings == ()
    assert (report.usable, report.verdict, report.cameras) == (True, "usable", 2)
    assert (report.width, report.height) == ((16, 16, 16), (32, 32, 32))
    assert report.parts["train"] == check.Counts(images=4, identities=2, cameras=2, junk=0, distractors=0)
    assert report.parts["gallery"] == check.Counts(images=4, identities=2, cameras=2, junk=1, distractors=1)
    assert lines(report) == [
        f"synthetic in {root}",
        "folders bounding_box_train, query, bounding_box_test",
        "",
        "         images  identities  cameras  junk  distractors",
        "train         4           2        2     0            0",
        "query         2           2        1     0            0",
        "gallery       4           2        2     1            1",
        "2 cameras in all; width x height from 16x32 to 16x32 pixels, median 16x32",
        "",
        "usable",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b"no image", "cannot identify image file"), (None, "image file is truncated")],
    ids=["empty", "text", "truncated"],
)
def test_unreadable_images(root, content, reason):
    path = root / "query" / "0001_c1s1_1.jpg"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    found, line = finding(root, "unreadable")
    assert (found.level, found.count) == ("problem", 1)
    assert found.about[0].startswith(f"query/0001_c1s1_1.jpg ({reason}")
    assert str(root) not in line
    assert "problem  1 x image that cannot be read; replace or remove it: query/0001_c1s1_1.jpg" in line


def test_junk_is_not_opened(root):
    (root / "bounding_box_test/-1_c1s1_1.jpg").write_bytes(b"")
    assert report_of(root).verdict == "usable"


def test_an_image_that_training_refuses_is_unreadable(root):
    Image.new("F", (16, 32)).save(root / "query" / "0001_c1s1_1.jpg", format="TIFF")
    found, _ = finding(root, "unreadable")
    assert "no known range" in found.about[0]


def copy(root, source, target):
    shutil.copy(root / source, root / target)


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        ("bounding_box_train/0003_c1s1_1.jpg", "bounding_box_train/0003_c1s1_9.jpg", "copies"),
        ("bounding_box_test/0001_c2s1_1.jpg", "bounding_box_test/0001_c2s1_9.jpg", "copies"),
        ("bounding_box_train/0003_c1s1_1.jpg", "bounding_box_train/0004_c1s1_9.jpg", "copies-identities"),
        ("bounding_box_test/0001_c2s1_1.jpg", "bounding_box_test/0002_c2s1_9.jpg", "copies-identities"),
        ("query/0001_c1s1_1.jpg", "bounding_box_test/0002_c1s1_9.jpg", "copies-identities"),
        ("query/0001_c1s1_1.jpg", "bounding_box_test/0001_c2s1_9.jpg", "copies-query-gallery"),
        ("query/0001_c1s1_1.jpg", "bounding_box_test/0001_c1s1_9.jpg", "copies"),
        ("bounding_box_train/0003_c1s1_1.jpg", "query/0001_c1s1_9.jpg", "copies-train-test"),
        ("bounding_box_train/0003_c1s1_1.jpg", "bounding_box_test/0000_c1s1_9.jpg", "copies-train-test"),
    ],
)
def test_copies(root, source, target, kind):
    copy(root, source, target)
    found, line = finding(root, kind)
    assert (found.level, found.count, found.about) == ("warning", 1, (f"{source} = {target}",))
    assert report_of(root).verdict == "usable, 1 warning"
    assert line.endswith(f": {source} = {target}")


def test_many_copies_stay_one_short_line(root):
    for index in range(40):
        copy(root, "bounding_box_train/0003_c1s1_1.jpg", f"bounding_box_train/0003_c1s1_copy{index}.jpg")
    found, line = finding(root, "copies")
    assert (found.count, found.about[0].count(" = ")) == (1, 40)
    assert len(line) < 300
    assert line.endswith("...")


def test_msmt17_numbers_its_test_people_anew(tmp_path):
    root = trees.msmt17(tmp_path)
    kinds = {f.kind for f in report_of(root, "msmt17-v1").findings}
    assert "overlap" not in kinds
    assert "distractors" not in kinds
    assert report_of(root, "msmt17-v1").parts["query"].identities == 2
    copy(root, f"train/{trees.MSMT17['train'][0]}", f"test/{trees.MSMT17['query'][0]}")
    report = report_of(root, "msmt17-v1")
    assert [f.about for f in report.findings if f.kind == "copies-train-test"] == [
        (f"train/{trees.MSMT17['train'][0]} = test/{trees.MSMT17['query'][0]}",)
    ]


@pytest.mark.parametrize(
    ("mode", "name", "said"),
    [("L", "9.jpg", "grey"), ("CMYK", "9.jpg", "CMYK"), ("P", "9.png", "palette"), ("RGBA", "9.png", "alpha")],
)
def test_odd_modes_are_notes(root, mode, name, said):
    trees.draw(root / "bounding_box_train" / f"0003_c1s1_{name}", mode=mode)
    found, line = finding(root, "mode")
    assert (found.level, found.about) == ("note", (f"bounding_box_train/0003_c1s1_{name}",))
    assert f"not 8-bit RGB but {said}; converted" in line
    assert report_of(root).verdict == "usable"


def test_16_bits_and_rotation_are_notes(root):
    path = root / "bounding_box_train" / "0003_c1s1_9.png"
    Image.effect_noise((16, 32), 9).convert("I;16").save(path)
    assert "16-bit" in finding(root, "mode")[0].text
    path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    trees.draw(root / "bounding_box_train" / "0003_c1s1_9.jpg", exif=exif)
    found, _ = finding(root, "rotated")
    assert (found.level, found.about) == ("note", ("bounding_box_train/0003_c1s1_9.jpg",))
    exif[0x0112] = 1
    trees.draw(root / "bounding_box_train" / "0003_c1s1_9.jpg", exif=exif)
    assert report_of(root).findings == ()


@pytest.mark.parametrize(
    ("size", "odd"), [((7, 16), True), ((8, 4097), True), ((65, 32), True), ((64, 32), False), ((8, 4096), False)]
)
def test_extreme_sizes(root, size, odd):
    trees.draw(root / "bounding_box_train" / "0003_c1s1_9.jpg", size=size)
    if odd:
        found, _ = finding(root, "size")
        assert found.about == (f"bounding_box_train/0003_c1s1_9.jpg ({size[0]}x{size[1]})",)
        assert found.level == "warning"
    report = report_of(root)
    assert report.usable
    assert report.width == (min(16, size[0]), 16, max(16, size[0]))
    assert report.height == (min(32, size[1]), 32, max(32, size[1]))
    assert bool(report.findings) == odd


def test_queries_without_a_match(root):
    (root / "bounding_box_test" / "0001_c2s1_1.jpg").rename(root / "bounding_box_test" / "0001_c1s1_2.jpg")
    found, line = finding(root, "no-match")
    assert (found.level, found.about) == ("warning", ("query/0001_c1s1_1.jpg",))
    assert "1 x query of 2 without a gallery crop of its identity from another camera; evaluation skips it" in line
    for name in ("0002_c2s1_1.jpg", "0002_c2s1_2.jpg"):
        (root / "bounding_box_test" / name).unlink()
    found, line = finding(root, "no-match")
    assert (found.level, found.count) == ("problem", 2)
    assert "nothing can be evaluated: query/0001_c1s1_1.jpg, query/0002_c1s1_1.jpg" in line


def test_train_identities_with_little_to_learn_from(root):
    trees.draw(root / "bounding_box_train" / "0005_c1s1_1.jpg")
    assert finding(root, "single-image")[0].about == ("bounding_box_train/0005_c1s1_1.jpg",)
    trees.draw(root / "bounding_box_train" / "0005_c1s1_2.jpg")
    assert finding(root, "single-camera")[0].about == ("bounding_box_train/0005_c1s1_1.jpg",)
    for name in HEALTHY["bounding_box_train"]:
        (root / "bounding_box_train" / name).unlink()
    trees.draw(root / "bounding_box_train" / "0005_c2s1_2.jpg")
    assert finding(root, "one-identity")[0].level == "warning"


def test_a_test_set_of_one_identity_is_no_test(tmp_path):
    trees.folders(tmp_path, [f"mine/{number}.jpg" for number in range(3)])
    found = {finding.kind: finding.level for finding in check.check("folder", tmp_path).findings}
    assert found["one-identity-test"] == "problem"
    trees.folders(tmp_path, ["other/1.jpg"])
    assert "one-identity-test" not in {finding.kind for finding in check.check("folder", tmp_path).findings}


@pytest.mark.parametrize("part", ["query", "bounding_box_test"])
def test_people_in_train_and_in_test(root, part):
    for camera in (1, 2):
        trees.draw(root / "bounding_box_train" / f"0007_c{camera}s1_1.jpg")
    if part == "query":
        trees.draw(root / "query" / "0007_c1s1_1.jpg")
        trees.draw(root / "bounding_box_test" / "0007_c2s1_1.jpg")
    else:
        trees.draw(root / "bounding_box_test" / "0007_c1s1_1.jpg")
    found, _ = finding(root, "overlap")
    assert (found.level, found.about) == ("warning", ("bounding_box_train/0007_c1s1_1.jpg",))


def test_distractors_belong_in_the_gallery(root):
    for camera in (1, 2):
        trees.draw(root / "bounding_box_train" / f"0000_c{camera}s1_1.jpg")
    found, line = finding(root, "distractors")
    assert (found.level, found.count) == ("warning", 2)
    assert "distractor (identity 0) in train" in line


def test_what_the_reader_refuses_is_listed_in_full(root):
    for name in "abcde":
        trees.draw(root / "query" / f"{name}.jpg")
    (root / "query" / "0001_c1s1_7.jpg").symlink_to("nowhere")
    report = report_of(root)
    assert report.verdict == "NOT usable: 2 problems"
    (names,) = [f for f in report.findings if "no identity" in f.text]
    assert names.about == tuple(f"query/{name}.jpg" for name in "abcde")
    assert (
        "problem  5 x no identity and camera in the name; expected names like 0002_c1s1_000451_03.jpg: "
        "query/a.jpg, query/b.jpg, query/c.jpg and 2 more"
    ) in lines(report)
    assert any(line.startswith("problem  1 x a link to nothing;") for line in lines(report))


def test_lines_of_lists_are_named(tmp_path):
    root = trees.msmt17(tmp_path)
    with (root / "list_query.txt").open("a") as file:
        file.write("nonsense\n../x.jpg 1\nagain\n")
    said = lines(report_of(root, "msmt17-v1"))
    assert (
        "problem  2 x not a line of 'path pid': list_query.txt:3 (found 'nonsense'), list_query.txt:5 (found 'again')"
    ) in said
    assert any("1 x a path that leaves the folder; found '../x.jpg'" in line for line in said)


def test_skipped_files_and_names_that_are_no_text(root):
    (root / "query" / ".DS_Store").write_text("")
    assert finding(root, "skipped")[0].about == ("query/.DS_Store",)
    shutil.copy(root / "query" / "0001_c1s1_1.jpg", os.fsencode(root) + b"/query/0001_c1_\xff.jpg")
    found, line = finding(root, "refused")
    assert found.about == (r"query/0001_c1_\xff.jpg",)
    line.encode()


def test_folders_of_ones_own(tmp_path):
    pool = trees.folders(tmp_path / "pool", [f"{person}/{i}.jpg" for person in ("ann", "bob") for i in range(3)])
    copy(pool, "ann/1.jpg", "ann/9.jpg")
    found, _ = finding(pool, "copies", "folder")
    assert found.about == ("ann/1.jpg = ann/9.jpg",)
    copy(pool, "ann/0.jpg", "ann/9.jpg")
    found, _ = finding(pool, "copies-query-gallery", "folder")
    assert found.about == ("ann/0.jpg = ann/9.jpg",)
    report = report_of(pool, "folder")
    assert {f.text for f in report.findings if f.level == "note"} >= {NO_CAMERAS, SHARED}
    assert (report.cameras, report.parts["train"].cameras) == (0, 0)
    assert any(line.startswith("cameras unknown; ") for line in lines(report))
    assert any(line.startswith("train") and "unknown" in line for line in lines(report))

    test = trees.folders(tmp_path / "test", ["train/9/c1.jpg", "train/9/c2.jpg", "test/8/c1.jpg", "test/-1/c1.jpg"])
    trees.folders(test, ["test/8/c1_2.jpg", "test/8/c2.jpg", "test/8/c2_2.jpg", "test/-1/c1_2.jpg"])
    report = report_of(test, "folder")
    assert {name: (part.images, part.junk) for name, part in report.parts.items()} == {
        "train": (2, 0),
        "query": (2, 0),
        "gallery": (2, 2),
    }
    assert report.layout == "one folder per identity in train, test"

    given = trees.folders(tmp_path / "given", ["query/ann/c1.jpg", "gallery/ann/c2.jpg", "gallery/cat/c2.jpg"])
    report = report_of(given, "folder")
    assert [(f.level, f.text) for f in report.findings] == [("note", NO_TRAIN)]
    assert report.verdict == "usable"
    trees.folders(given, ["train/ann/c1.jpg", "train/ann/c2.jpg", "train/bob/c1.jpg", "train/bob/c2.jpg"])
    assert finding(given, "overlap", "folder")[0].about == ("train/ann/c1.jpg",)


def test_published_counts(root, monkeypatch):
    market = dataset_specs.DATASETS["market1501"]
    trees.draw(root / "bounding_box_test" / "0009_c1s1_1.jpg")  # nobody asks for 9: counted by nobody
    true = dataset_specs.Published(train=4, query=2, gallery=5, train_ids=2, test_ids=2, cameras=2)
    monkeypatch.setitem(dataset_specs.DATASETS, "market1501", check.dataclasses.replace(market, published=true))
    report = report_of(root, "market1501")
    assert report.findings == ()
    assert lines(report)[3:8] == [
        "         images  published     identities  published     cameras  junk  distractors",
        "train         4  as published           2  as published        2     0            0",
        "query         2  as published           2  as published        1     0            0",
        "gallery       5  as published           3                      2     1            1",
        "2 cameras in all, as published; width x height from 16x32 to 16x32 pixels, median 16x32",
    ]
    text = finding(root, "published", "dukemtmc-reid")[0].text
    assert text == "count that differs from the published one; these are the counts of market1501"
    trees.draw(root / "query" / "0001_c3s1_2.jpg")
    found, line = finding(root, "published", "market1501")
    assert (found.level, found.count) == ("warning", 2)
    assert line.endswith("count that differs from the published one: query images 3 (2), cameras 3 (2)")
    assert [row.split()[2:4] for row in lines(report_of(root, "market1501"))[5:6]] == [["+1", "(2)"]]


def test_published_counts_of_every_data_set():
    table = {
        "market1501": (12_936, 3_368, 15_913, 751, 750, 6),
        "dukemtmc-reid": (16_522, 2_228, 17_661, 702, 702, 8),
        "cuhk03-np-labeled": (7_368, 1_400, 5_328, 767, 700, 2),
        "cuhk03-np-detected": (7_365, 1_400, 5_332, 767, 700, 2),
        "msmt17-v1": (32_621, 11_659, 82_161, 1_041, 3_060, 15),
        "msmt17-v2": (32_621, 11_659, 82_161, 1_041, 3_060, 15),
    }
    given = {name: layout.published for name, layout in dataset_specs.DATASETS.items() if layout.published}
    assert {name: tuple(vars(published).values()) for name, published in given.items()} == table


def test_an_image_that_goes_away_is_a_fault(tmp_path, monkeypatch):
    assert "No such file" in inspect_image(tmp_path / "gone.jpg").fault

    def gone(path):
        raise FileNotFoundError(2, "No such file", str(path))

    monkeypatch.setattr(images, "sha256", gone)
    assert inspect_image(trees.draw(tmp_path / "going.jpg")).fault == "No such file"


def run(*args):
    return run_here("-m", "pmm", "check", *args)


def test_exit_codes(root):
    assert run("--dataset", "synthetic", "--root", root, "--strict").returncode == 0
    done = run("--dataset", "market", "--root", root)  # counts differ
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "usable, 1 warning")
    assert run("--dataset", "market", "--root", root, "--strict").returncode == 1
    (root / "query" / "0001_c1s1_1.jpg").write_bytes(b"")
    done = run("--dataset", "synthetic", "--root", root)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (1, "NOT usable: 1 problem", "")


def test_json_has_everything(root, tmp_path):
    for name in "abcde":
        trees.draw(root / "query" / f"{name}.jpg")
    out = tmp_path / "out" / "report.json"
    assert run("--dataset", "market1501", "--root", root, "--json", out).returncode == 1
    report = json.loads(out.read_text())
    assert (report["schema"], report["dataset"], report["folder"]) == (1, "market1501", str(root))
    assert report["parts"]["gallery"] == {"images": 4, "identities": 2, "cameras": 2, "junk": 1, "distractors": 1}
    assert (report["usable"], report["verdict"]) == (False, "NOT usable: 1 problem")
    assert (report["width"], report["height"], report["cameras"]) == ([16] * 3, [32] * 3, 2)
    assert report["published"][0] == {"key": "train", "words": "train images", "found": 4, "published": 12_936}
    assert {figure["key"] for figure in report["published"]} == set(
        vars(dataset_specs.DATASETS["market1501"].published)
    )
    assert report["findings"][0] == {
        "level": "problem",
        "kind": "refused",
        "text": "no identity and camera in the name; expected names like 0002_c1s1_000451_03.jpg",
        "count": 5,
        "about": [f"query/{name}.jpg" for name in "abcde"],
    }


def test_errors_are_one_line(root, tmp_path):
    assert_one_line_error(
        run("--dataset", "market", "--root", tmp_path / "no"), f"{tmp_path / 'no'}: ", "folder", "market1501"
    )
    assert_one_line_error(
        run("--dataset", "msmt17-v1", "--root", root), f"{root}: ", "layout of msmt17-v1", "list_train"
    )
    assert_one_line_error(run("--dataset", "mars", "--root", root), "--dataset is 'mars'", "market1501")
    assert_one_line_error(run("--dataset", "market", "--root", root, "--threads", "-1"), "--threads is -1")
    assert_one_line_error(run("--dataset", "market", "--root", root, "--json", tmp_path), "it is a folder")


def test_it_runs_without_torch(root):
    done = run_without_torch("-m", "pmm", "check", "--dataset", "synthetic", "--root", root)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "usable"), done.stderr


def test_synthetic_people_are_healthy(people):
    report = report_of(people)
    assert report.usable
    assert report.parts == counts.counts_of(check.scan("synthetic", people))


def test_people_in_train_and_among_the_queries_alone(root):
    trees.draw(root / "query" / "0003_c1s1_1.jpg")
    (overlap,) = [f for f in report_of(root).findings if f.kind == "overlap"]
    assert overlap.about == ("bounding_box_train/0003_c1s1_1.jpg",)
