"""A file and its manifest get their names together, and are used again only while they are right."""

import dataclasses

import pytest

from pmm.artifacts.artifact import (
    Artifact,
    manifest_path,
    new_artifact,
    read_manifest,
    selftest_paths,
    write_thresholds,
)
from pmm.utils.errors import InvalidFile
from pmm.utils.files import sha256
from tests.artifacts.test_manifest import MANIFEST, THRESHOLDS
from tests.refusals import refuses


@pytest.fixture
def written(tmp_path):
    with new_artifact(tmp_path / "model.onnx", MANIFEST) as draft:
        draft.path.write_bytes(b"content")
    return Artifact(tmp_path / "model.onnx", draft.manifest)


def test_what_is_written_is_read_with_the_hash_of_the_file(written):
    digest = sha256(written.path)
    assert read_manifest(written.path, digest) == written.manifest == dataclasses.replace(MANIFEST, sha256=digest)
    assert read_manifest(written.path) == written.manifest
    with refuses(InvalidFile, "sha256 000000000000", digest[:12], path=written.path, hint="export"):
        read_manifest(written.path, "0" * 64)
    manifest_path(written.path).unlink()
    assert read_manifest(written.path, digest) is None


def test_a_draft_can_be_opened_under_the_name_it_will_have(tmp_path):
    out = tmp_path / "model.plan"

    def open_and_fail():
        with new_artifact(out, MANIFEST) as draft:
            draft.path.write_bytes(b"content")
            with draft.openable():
                assert read_manifest(draft.path).method == MANIFEST.method
                raise InvalidFile(f"broken {draft.path}", path=draft.path, hint=f"remove {draft.path}")

    with refuses(InvalidFile, problem=f"broken {out}", path=out, hint=f"remove {out}"):
        open_and_fail()
    assert not list(tmp_path.iterdir())


def test_thresholds_take_the_place_of_earlier_ones_of_their_precision(written):
    half = dataclasses.replace(THRESHOLDS, precision="fp16")
    newer = dataclasses.replace(THRESHOLDS, genuine=200)
    for measured in (THRESHOLDS, half, newer):
        assert write_thresholds(written.path, measured)
    found = read_manifest(written.path)
    assert found == dataclasses.replace(written.manifest, thresholds=(half, newer))
    manifest_path(written.path).unlink()
    assert not write_thresholds(written.path, THRESHOLDS)
    assert not manifest_path(written.path).exists()


def test_a_selftest_comes_and_goes_with_its_file(written, tmp_path):
    path = tmp_path / "model.onnx"

    def write(content, selftest):
        with new_artifact(path, written.manifest) as draft:
            draft.path.write_bytes(content)
            draft.selftest = selftest

    as_json, as_npz = selftest_paths(path)
    write(b"1", (b"json", b"npz"))
    assert (as_json.read_bytes(), as_npz.read_bytes()) == (b"json", b"npz")
    with pytest.raises(TypeError):
        write(b"2", (b"other", "no bytes"))
    assert (path.read_bytes(), as_json.read_bytes(), as_npz.read_bytes()) == (b"1", b"json", b"npz")
    write(b"3", None)
    assert sorted(each.name for each in tmp_path.iterdir() if "selftest" in each.name) == []
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
