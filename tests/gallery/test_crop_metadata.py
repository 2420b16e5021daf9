"""Camera and time of crops: what names and tables say is what is stored, and what they cannot mean is one line."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.gallery.crop_metadata import columns_of_table, crop_columns, name_pattern, parse_time
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue
from tests.refusals import refuses


def table(tmp_path, text):
    path = tmp_path / "crops.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12.5", 12.5),
        ("1_000451", 1_000_451.0),
        ("1970-01-01", 0.0),
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01 02:00:00+02:00", 0.0),
    ],
)
def test_times_are_seconds(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "nan", "inf", "noon", "2026-13-01"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_time(text)


def test_names_of_known_data_sets_and_of_an_expression(tmp_path):
    market = crop_columns(
        tmp_path, ["0002_c1s2_000451_03.jpg", "a/-1_c6s1_000007_00.jpg"], names=name_pattern("market1501")
    )
    assert market["camera"].tolist() == ["1", "6"]
    assert market["time"].tolist() == [2_000_451, 1_000_007], "the frames of two sequences are not at one time"
    assert market["pid"].tolist() == [2, -1]
    duke = crop_columns(tmp_path, ["0001_c2_f0046182.jpg"], names=name_pattern("dukemtmc-reid"))
    assert (duke["camera"].tolist(), duke["time"].tolist()) == (["2"], [46182.0])
    own = name_pattern(r"^(?P<camera>\w+)/(?P<time>[-T\d]+)_(?P<box>\d+)")
    found = crop_columns(tmp_path, ["door/2026-05-01_7.jpg"], names=own)
    assert found["camera"].tolist() == ["door"]
    assert found["time"].tolist() == [parse_time("2026-05-01")]
    assert (found["box"].dtype, found["box"].tolist()) == (np.int64, [7])


def test_names_that_do_not_match_are_counted_and_named(tmp_path):
    with refuses(InvalidFile, "2 of 3", "a.jpg, b.jpg", "--names", path=tmp_path):
        crop_columns(tmp_path, ["a.jpg", "0002_c1s2_000451_03.jpg", "b.jpg"], names=name_pattern("market1501"))
    with refuses(InvalidFile, "time is 'x'", path=tmp_path / "x.jpg"):
        crop_columns(tmp_path, ["x.jpg"], names=name_pattern("(?P<time>.)"))


@pytest.mark.parametrize(
    ("text", "fact"),
    [("market", "market1501"), ("c(", "no regular expression"), ("(?P<path>.*)", "pmm embed fills path itself"),
     ("(?P<Camera>.)", "small letters")],
)  # fmt: skip
def test_an_expression_that_says_nothing_is_refused(text, fact):
    with refuses(InvalidValue, fact, name="--names", value=text):
        name_pattern(text)


def test_a_table_gives_columns_in_the_order_of_the_files(tmp_path, caplog):
    text = "path,camera,time,floor,weight,note\nb.jpg,2,5,3,1.5,x\n./sub/a.jpg,1,1970-01-01,4,2,7\ngone.jpg,1,2,3,4,5\n"
    found = columns_of_table(table(tmp_path, text), ["sub/a.jpg", "b.jpg"], tmp_path)
    assert {name: values.tolist() for name, values in found.items()} == {
        "camera": ["1", "2"], "time": [0.0, 5.0], "floor": [4, 3], "weight": [2.0, 1.5], "note": ["7", "x"],
    }  # fmt: skip
    assert [values.dtype.kind for values in found.values()] == ["O", "f", "i", "f", "O"]
    assert "1 line of no image" in caplog.text
    assert "gone.jpg" in caplog.text


def test_absolute_paths_of_a_table_are_of_the_folder(tmp_path):
    found = columns_of_table(table(tmp_path, f"path,camera\n{tmp_path}/a.jpg,7\n"), ["a.jpg"], tmp_path)
    assert found["camera"].tolist() == ["7"]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", ["no column path"]),
        ("file,camera\na.jpg,1\n", ["no column path", "file, camera"]),
        ("path,camera\n", ["no line below its header"]),
        ("path,,x\na.jpg,1,2\n", ["column 2 has no name"]),
        ("path,x,x\na.jpg,1,2\n", ["two columns are named x"]),
        ("path,file_size\na.jpg,1\n", ["file_size", "pmm embed fills"]),
        ("path,Camera\na.jpg,1\n", ["Camera", "small letters"]),
        ("path,camera\na.jpg,1,2\n", ["line 2", "3 cells", "2, as its first line has"]),
        ("path,camera\na.jpg,1\n./a.jpg,2\n", ["lines 2 and 3", "a.jpg"]),
        ("path,camera\nb.jpg,1\n", ["1 of 1 images", "a.jpg"]),
        ("path,time\na.jpg,soon\n", ["line 2", "'soon'", "seconds"]),
        ('path,note\na.jpg,"x\n', ["line 2"]),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(tmp_path, text, facts):
    path = table(tmp_path, text)
    with refuses(InvalidFile, "crops.csv", *facts):
        columns_of_table(path, ["a.jpg"], tmp_path)


def test_a_table_that_is_not_there_is_one_line(tmp_path):
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none.csv", expected="path"):
        columns_of_table(tmp_path / "none.csv", ["a.jpg"], tmp_path)


def test_one_column_from_two_places_is_refused(tmp_path):
    path = table(tmp_path, "path,camera\nc1.jpg,1\n")
    with refuses(ConflictingOptions, "camera", options=("--names", "--metadata")):
        crop_columns(tmp_path, ["c1.jpg"], names=name_pattern(r"c(?P<camera>\d)"), table=path)


@given(st.lists(st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_texts_of_a_table_come_back_as_they_are(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("table") / "crops.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "note"), *((f"{row}.jpg", text) for row, text in enumerate(texts))])
    note = columns_of_table(path, [f"{row}.jpg" for row in range(len(texts))], path.parent)["note"]
    assert [type(note[0])(text) for text in texts] == note.tolist()
