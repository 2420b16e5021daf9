"""The two files: the same selftest back, the same bytes again, and one line for whatever else they may be."""

import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.artifacts.artifact import selftest_paths
from pmm.selftest.vectors import read_selftest, selftest_files
from pmm.utils.errors import InvalidFile
from tests.conftest import examples
from tests.refusals import refuses
from tests.selftest.made_up import made_up

DIGEST = "a" * 64


@pytest.fixture
def artifact(tmp_path):
    """A file with its selftest beside it."""
    path = tmp_path / "model.onnx"
    write(path, *selftest_files(made_up()))
    return path


def write(artifact, as_json, npz):
    for path, content in zip(selftest_paths(artifact), (as_json, npz), strict=True):
        path.write_bytes(content)


def with_arrays(artifact, **arrays):
    """The files with these arrays, and the JSON naming them: what only a look into them finds."""
    as_json, _ = selftest_paths(artifact)
    file = io.BytesIO()
    np.savez(file, **{**made_up().vectors.arrays, **arrays})
    facts = json.loads(as_json.read_text()) | {"vectors_sha256": hashlib.sha256(file.getvalue()).hexdigest()}
    write(artifact, json.dumps(facts).encode(), file.getvalue())


def test_what_is_read_is_what_was_written_and_written_again_has_the_same_bytes(artifact):
    before, after = made_up(), read_selftest(artifact, DIGEST)
    assert after.tolerances == before.tolerances
    assert after.vectors.mistakes == before.vectors.mistakes
    assert after.vectors.sized == [0, 1]
    assert after.vectors.arrays.keys() == before.vectors.arrays.keys()
    assert all(np.array_equal(after.vectors.arrays[name], each) for name, each in before.vectors.arrays.items())
    assert selftest_files(after) == selftest_files(before)


def test_numpy_reads_it(artifact):
    with np.load(selftest_paths(artifact)[1], allow_pickle=False) as npz:
        assert npz["crop_0"].dtype == np.uint8
        assert npz["expected"].shape == npz["mistake_bgr"].shape == (4, 16)


def test_no_day_is_in_it():
    with zipfile.ZipFile(io.BytesIO(selftest_files(made_up())[1])) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_one_that_is_missing_or_of_another_file(artifact):
    with refuses(InvalidFile, DIGEST[:12], "b" * 12, path=selftest_paths(artifact)[0], hint="export"):
        read_selftest(artifact, "b" * 64)
    for path in reversed(selftest_paths(artifact)):
        path.unlink()
        with refuses(InvalidFile, path.name, path=artifact, hint="export"):
            read_selftest(artifact, DIGEST)


def test_arrays_of_another_selftest(artifact):
    as_json, _ = selftest_files(made_up())
    write(artifact, as_json, selftest_files(made_up(seed=1))[1])
    with refuses(InvalidFile, path=selftest_paths(artifact)[1]):
        read_selftest(artifact, DIGEST)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("expected", np.zeros((4, 15), np.float32)),
        ("expected", np.zeros((4, 16), np.float64)),
        ("expected", np.full((4, 16), np.nan, np.float32)),
        ("mistake_bgr", np.full((4, 16), np.inf, np.float32)),
        ("crop_0", np.zeros((6, 4, 3), np.int8)),
        ("crop_3", np.zeros((2000, 2000, 3), np.uint8)),
        ("expected", np.array([[None] * 16] * 4, object)),
    ],
)
def test_arrays_of_another_kind(artifact, name, array):
    with_arrays(artifact, **{name: array})
    with refuses(InvalidFile, path=selftest_paths(artifact)[1]):
        read_selftest(artifact, DIGEST)


@pytest.mark.parametrize(
    "facts",
    [
        {"format": "pmm-selftest-9"},
        {"dim": 10**9},
        {"dim": "16"},
        {"crops": []},
        {"crops": [{"name": "../x.png", "height": 6, "width": 4}] * 4},
        {"crops": [{"name": "x.png", "height": 10**6, "width": 4}] * 4},
        {"mistakes": [{"name": "a/b", "description": "", "fix": "", "resizes": False}]},
        {"precision": "fp64"},
        {"tolerances": {"fp32": {"min_cosine": float("nan"), "max_norm_error": 0}}},
        {"more": 1},
        {"precision": "foo", "tolerances": {"foo": {"min_cosine": 0.99, "max_norm_error": 0.0}}},
        {"tolerances": {"fp32": {"min_cosine": -1, "max_norm_error": 0}}},
        {"tolerances": {"fp32": {"min_cosine": 1, "max_norm_error": 9e9}}},
        {"rounding": {"min_cosine": 0.1, "max_norm_error": 0}},
        {"height": 7},
        {"crops": [{"name": "x.png", "height": 6, "width": 4}] * 4},
        {"crops": [{"name": f"{k}.png", "height": 6, "width": 4} for k in ("a", "b", "..c")]},
        {"mistakes": [{"name": "a", "description": "", "fix": "", "resizes": False}] * 2},
        {"dim": 1 << 17, "crops": [{"name": f"{k}.png", "height": 6, "width": 4} for k in range(64)]},
    ],
)
def test_a_json_that_says_what_cannot_be(artifact, facts):
    as_json, _ = selftest_paths(artifact)
    as_json.write_text(json.dumps(json.loads(as_json.read_text()) | facts))
    with refuses(InvalidFile, path=as_json, hint="export"):
        read_selftest(artifact, DIGEST)


@given(st.binary(max_size=200) | st.sampled_from([b"[]", b"null", b"{}", b"[" * 5000]))
@examples(30)
def test_whatever_lies_there_is_refused_in_one_line(tmp_path_factory, content):
    artifact = tmp_path_factory.mktemp("any") / "model.onnx"
    write(artifact, content, content)
    with refuses(InvalidFile):
        read_selftest(artifact, DIGEST)


@given(st.data())
@examples(30)
def test_a_bit_that_flipped_in_the_arrays_is_found(tmp_path_factory, data):
    artifact = tmp_path_factory.mktemp("bit") / "model.onnx"
    as_json, npz = selftest_files(made_up())
    place = data.draw(st.integers(0, len(npz) - 1))
    write(artifact, as_json, npz[:place] + bytes([npz[place] ^ 1]) + npz[place + 1 :])
    with refuses(InvalidFile, path=selftest_paths(artifact)[1]):
        read_selftest(artifact, DIGEST)
