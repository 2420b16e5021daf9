from pathlib import Path

import pytest
from PIL import Image

from pmm.data.readers import read_dataset, split_validation
from pmm.data.samples import Sample, class_indices
from pmm.errors import UserError

NAMES = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c3s1_000551_00.jpg", "0007_c6s2_000001_01.jpg"],
    "query": ["0001_c1s1_001051_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_00.jpg",
        "0000_c2s1_000401_00.jpg",
        "0001_c2s1_000401_00.jpg",
        "0001_c1s1_000401_00.jpg",
        "Thumbs.db",
    ],
}


def make_tree(root: Path) -> Path:
    for part, names in NAMES.items():
        (root / part).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (4, 8)).save(root / part / name, format="JPEG")
    return root


@pytest.mark.parametrize(
    "below", ["", "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"], ids=lambda b: b or "root"
)
def test_market_layouts(tmp_path, below):
    make_tree(tmp_path / below)
    split = read_dataset("market1501", tmp_path)
    assert [(s.pid, s.camid) for s in split.train] == [(2, 0), (2, 2), (7, 5)]
    assert [(s.pid, s.camid) for s in split.query] == [(1, 0)]
    assert sorted((s.pid, s.camid) for s in split.gallery) == [(0, 1), (1, 0), (1, 1)]
    assert class_indices(split.train) == {2: 0, 7: 1}
    assert "train 3 images of 2 identities" in split.describe()


def test_synthetic_people_are_read_by_the_same_reader(people):
    assert read_dataset("synthetic", people) == read_dataset("market1501", people)


def test_only_the_file_name_is_parsed(tmp_path):
    make_tree(tmp_path / "0099_c9_misleading")
    split = read_dataset("market1501", tmp_path / "0099_c9_misleading")
    assert {s.pid for s in split.train} == {2, 7}


def test_missing_folder_wrong_layout_and_empty_parts(tmp_path):
    with pytest.raises(UserError, match="is not a folder; expected the root of market1501"):
        read_dataset("market1501", tmp_path / "nowhere")
    with pytest.raises(UserError, match="found nothing"):
        read_dataset("market1501", tmp_path)
    (tmp_path / "bounding_box_train").mkdir()
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(UserError, match=r"expected the folders .*query.*; found bounding_box_train/, readme.txt"):
        read_dataset("market1501", tmp_path)
    make_tree(tmp_path / "market1501")
    for path in (tmp_path / "market1501" / "query").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="query holds no usable image"):
        read_dataset("market1501", tmp_path)
    with pytest.raises(UserError, match="unknown data set 'cuhk'; known: market1501, synthetic"):
        read_dataset("cuhk", tmp_path)


@pytest.mark.parametrize("name", ["person.jpg", "12-3_c1.jpg", "0001_c0s1.jpg"])
def test_odd_names_are_refused(tmp_path, name):
    make_tree(tmp_path)
    Image.new("RGB", (4, 8)).save(tmp_path / "query" / name)
    with pytest.raises(UserError, match="no identity and camera in the name"):
        read_dataset("market1501", tmp_path)


def crops(pids, cameras, each):
    return tuple(
        Sample(Path(f"{p}_{c}_{i}"), p, c) for p in range(1, pids + 1) for c in range(cameras) for i in range(each)
    )


def test_validation_identities_are_held_out_whole():
    train = crops(10, 3, 2)
    split = split_validation(train, 0.2, seed=0)
    held = {s.pid for s in split.query}
    assert len(held) == 2
    assert held == {s.pid for s in split.gallery}
    assert not held & {s.pid for s in split.train}
    assert set(split.train) | set(split.query) | set(split.gallery) == set(train)
    assert [(s.pid, s.camid) for s in split.query] == sorted((p, c) for p in held for c in range(3))
    assert split == split_validation(train, 0.2, seed=0)
    assert split != split_validation(train, 0.2, seed=3)


def test_no_validation_and_unusable_validation():
    train = crops(10, 3, 2)
    assert split_validation(train, 0.0, seed=0).train == train
    with pytest.raises(UserError, match="none has crops of two cameras"):
        split_validation(crops(10, 1, 2), 0.2, seed=0)
