"""A sealed folder: read as it was made, refused after any change."""

import json
import shutil

import pytest

from pmm.artifacts.bundle import SEAL, is_bundle, only_sealed, read_bundle, seal
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "made"
    (folder / "report").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.json", "thresholds.json", "report/report.html"):
        (folder / name).write_text(name)
    seal(folder, artifact="model.onnx", backend="ort-cpu", precision="int8")
    return folder


def test_a_copy_reads_as_it_was_sealed(sealed, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "elsewhere" / "copy")
    bundle = read_bundle(copy)
    assert is_bundle(copy)
    assert not is_bundle(copy / "report")
    assert bundle == read_bundle(sealed)
    assert (bundle.artifact, bundle.backend, bundle.precision) == ("model.onnx", "ort-cpu", "int8")
    assert sorted(bundle.files) == ["model.onnx", "model.onnx.json", "report/report.html", "thresholds.json"]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.json", "thresholds.json", "report/report.html"])
@pytest.mark.parametrize("damage", ["changed", "missing", "link"])
def test_every_file_is_bound(sealed, tmp_path, name, damage):
    file = sealed / name
    if damage == "changed":
        file.write_text("another")
    else:
        content = file.read_bytes()
        file.unlink()
        if damage == "link":
            (tmp_path / "outside").write_bytes(content)
            file.symlink_to(tmp_path / "outside")
    with refuses(InvalidFile, path=file):
        read_bundle(sealed)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "pmm-bundle-9"},
        {"precision": "fp8"},
        {"artifact": "other.onnx"},
        {"files": {"model.onnx": "0", "../out": "0"}},
        {"files": {"model.onnx": "0", "/etc/passwd": "0"}},
        {"files": {"model.onnx": "0", "a\\b": "0"}},
        {"files": ["model.onnx"]},
    ],
)
def test_a_seal_that_says_the_impossible_is_refused(sealed, change):
    path = sealed / SEAL
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refuses(InvalidFile, path=path):
        read_bundle(sealed)


def test_a_folder_without_a_seal_is_none(tmp_path):
    with refuses(InvalidFile, SEAL, path=tmp_path):
        read_bundle(tmp_path)
    (tmp_path / SEAL).write_text("{")
    with refuses(InvalidFile, path=tmp_path / SEAL):
        read_bundle(tmp_path)


def test_what_a_user_added_is_noticed(sealed, tmp_path):
    assert only_sealed(sealed)
    (sealed / "report" / "notes.txt").write_text("mine")
    assert not only_sealed(sealed)
    (tmp_path / SEAL).write_text('{"name": "another program"}')
    assert not only_sealed(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "report/more.html", ".hidden", "deep/er/file"])
def test_what_was_added_is_refused_by_name(sealed, name):
    file = sealed / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with refuses(InvalidFile, path=file):
        read_bundle(sealed)
    file.unlink()
    read_bundle(sealed)


def test_a_link_that_was_added_is_refused(sealed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (sealed / "link").symlink_to(tmp_path / "elsewhere")
    with refuses(InvalidFile, path=sealed / "link"):
        read_bundle(sealed)
