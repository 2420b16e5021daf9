"""When a file of an earlier export is used again."""

import dataclasses
import shutil

import pytest

from pmm.artifacts.artifact import manifest_path, read_manifest, selftest_paths
from pmm.artifacts.onnx_file import read_onnx
from pmm.export.cached import has_selftest, reusable
from pmm.selftest.reference import possible_mistakes
from pmm.selftest.vectors import read_selftest, selftest_files
from pmm.utils.files import sha256


def copied(exported, folder):
    """The ONNX file, its manifest and its selftest, in `folder`."""
    folder.mkdir()
    for path in (exported, manifest_path(exported), *selftest_paths(exported)):
        shutil.copy(path, folder)
    return folder / exported.name


def forget_a_mistake(path):
    """Write the selftest of an earlier version beside `path`, which names one mistake less."""
    selftest = read_selftest(path, sha256(path))
    *kept, left_out = selftest.vectors.mistakes
    arrays = {name: array for name, array in selftest.vectors.arrays.items() if name != f"mistake_{left_out.name}"}
    vectors = dataclasses.replace(selftest.vectors, mistakes=tuple(kept), arrays=arrays)
    for place, content in zip(
        selftest_paths(path), selftest_files(dataclasses.replace(selftest, vectors=vectors)), strict=True
    ):
        place.write_bytes(content)
    return left_out.name


def remove_selftest(path):
    for place in selftest_paths(path):
        place.unlink()


@pytest.fixture
def path(exported, tmp_path):
    return copied(exported, tmp_path / "made")


def used(path, *, same=True, verified=True, built_from=None):
    artifact = reusable(path, lambda manifest: same, verified=verified, built_from=built_from)
    assert artifact is None or artifact.path == path
    return artifact is not None


def test_a_whole_file_that_is_what_would_be_made(path):
    assert used(path)
    assert not used(path, same=False)
    path.write_bytes(path.read_bytes() + b"damaged")
    assert not used(path)
    assert not used(path.with_name("missing.onnx"))
    manifest_path(path).unlink()
    assert not used(path)


def test_an_unverified_file_only_where_nobody_asks_for_a_parity_check(path):
    unverified = dataclasses.replace(read_manifest(path), parity=None)
    manifest_path(path).write_text(unverified.to_json())
    assert not used(path)
    assert used(path, verified=False)


def test_a_file_whose_selftest_names_all_mistakes(path):
    names = possible_mistakes(read_manifest(path))
    assert has_selftest(path, names)
    forgotten = forget_a_mistake(path)
    assert forgotten in names
    assert has_selftest(path)
    assert not has_selftest(path, names)
    assert not used(path)
    remove_selftest(path)
    assert not used(path)


def test_an_engine_needs_the_selftest_of_its_onnx_file(exported, path, tmp_path):
    """Which is here another ONNX file: that an engine is built of one is all that is asked."""
    source = copied(exported, tmp_path / "source")
    assert used(path, built_from=read_onnx(source))
    forget_a_mistake(path)
    assert not used(path, built_from=read_onnx(source))
    forget_a_mistake(source)
    assert used(path, built_from=read_onnx(source))
    remove_selftest(path)
    assert not used(path, built_from=read_onnx(source))
    remove_selftest(source)
    assert used(path, built_from=read_onnx(source))
