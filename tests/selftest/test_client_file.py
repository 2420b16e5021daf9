"""Embeddings as clients write them: whatever is plain is read, all else is one line."""

import io

import numpy as np
import pytest

from pmm.selftest.client_file import read_client_embeddings
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses

ROWS = np.array([[1.5, -2, 3e-4], [0.25, 5, 6]])


@pytest.mark.parametrize(
    "text",
    [
        "1.5,-2,3e-4\n0.25,5,6\n",
        "1.5, -2, 3e-4\r\n0.25, 5, 6",
        "1.5 -2 3e-4\n0.25  5\t6\n\n",
        "1.5\t-2\t3e-4\n0.25\t5\t6\n",
        "1.5;-2;3e-4\n0.25;5;6\n",
        "1,5;-2;3e-4\n0,25;5;6\n",
        "1.5,-2,3e-4,\n0.25,5,6,\n",
        "a,b,c\n1.5,-2,3e-4\n0.25,5,6\n",
        "file,e0,e1,e2\ncrop-0.png,1.5,-2,3e-4\ncrop-1.png,0.25,5,6\n",
        "# of OpenCV\n1.5,-2,3e-4\n0.25,5,6\n",
        '"1.5","-2","3e-4"\n"0.25","5","6"\n',
        "\ufeff1.5,-2,3e-4\n0.25,5,6\n",
        "[1.5, -2, 3e-4]\n[0.25, 5, 6]\n",
    ],
)
def test_text_that_is_plain(tmp_path, text):
    path = tmp_path / "theirs.csv"
    path.write_text(text, encoding="utf-8")
    assert np.allclose(read_client_embeddings(path), ROWS, rtol=1e-12)


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4", "<i4"])
def test_arrays_of_numpy_whatever_their_name(tmp_path, kind):
    path = tmp_path / "theirs.bin"
    with path.open("wb") as file:
        np.save(file, ROWS.astype(kind))
    assert np.allclose(read_client_embeddings(path), ROWS.astype(kind))
    with path.open("wb") as file:
        np.save(file, ROWS.astype(kind)[:, :, None, None])
    assert read_client_embeddings(path).shape == ROWS.shape


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "numbers"),
        ("\n\n", "numbers"),
        ("1,2\n3,x\n", "'x'"),
        ("1,2\n3\n", 2),
        ("1,2,3\n1,2,3,4\n", 4),
        ("1,,2\n", "''"),
        ("2,1_0\n", "'1_0'"),
        ("nan(ind),-nan(ind)\n1,2\n", "'nan(ind)'"),
        ("[1.5, -2;\n 0.25, 5]\n", "Mat"),
        ("[[1.5, -2], [0.25, 5]]\n", "JSON"),
        ("[\n  [1.5, -2],\n  [0.25, 5]\n]\n", "JSON"),
        ('{"rows": [[1.5, -2]]}\n', "JSON"),
        (",0,1\n0,1.5,-2\n1,0.25,5\n", "header"),
        ("0,1\n1.5,-2\n0.25,5\n", "header"),
    ],
)
def test_text_that_is_something_else(tmp_path, text, fact):
    path = tmp_path / "theirs.csv"
    path.write_text(text)
    with refuses(InvalidFile, fact, path=path):
        read_client_embeddings(path)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "theirs.npy"
    with refuses(InvalidFile, path=path):
        read_client_embeddings(path)
    with refuses(InvalidFile, "folder", path=tmp_path):
        read_client_embeddings(tmp_path)
    for array, fact in ((np.zeros(3), "[3]"), (np.array([["a"]]), "<U1"), (np.zeros((2, 3, 4)), "[2, 3, 4]")):
        np.save(path, array)
        with refuses(InvalidFile, fact, path=path):
            read_client_embeddings(path)
    np.save(path, np.array([[None]], object), allow_pickle=True)
    with refuses(InvalidFile, "Python objects", path=path):
        read_client_embeddings(path)
    content = io.BytesIO()
    np.save(content, ROWS)
    for broken in (content.getvalue()[:-5], b"\x93NUMPY", b"\xff\xfe\x00\x01", b"\0" * 9):
        path.write_bytes(broken)
        with refuses(InvalidFile, path=path):
            read_client_embeddings(path)
