"""pmm selftest: 0 for right embeddings, 1 with the mistake for others, 2 for a command line that makes no sense; of bad
input one line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pmm.artifacts.artifact import manifest_path, selftest_paths
from pmm.runtime.open import open_runner
from pmm.selftest.vectors import read_selftest
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, run_here, run_without_torch


def selftest(*args):
    return run_here("-m", "pmm", "selftest", *args)


@pytest.fixture
def artifact(exported, tmp_path):
    """An ONNX file, its manifest and its selftest, to change."""
    path = tmp_path / "model.onnx"
    for source, copy in zip(files(exported), files(path), strict=True):
        shutil.copyfile(source, copy)
    return path


def files(artifact):
    return (artifact, manifest_path(artifact), *selftest_paths(artifact))


@pytest.fixture(scope="module")
def theirs(exported):
    """Right embeddings, and those of a client that feeds BGR."""
    images = read_selftest(exported, sha256(exported)).vectors.images
    with open_runner(exported, device="cpu") as runner:
        return runner(images), runner([image[..., ::-1] for image in images])


def test_the_file_is_run_here(artifact):
    for backend in ("auto", "openvino"):
        done = selftest(artifact, "--backend", backend, "--json")
        assert done.returncode == 0, done.stderr
        verdict = json.loads(done.stdout)
        assert (verdict["passed"], verdict["mistakes"], verdict["precision"]) == (True, [], "fp32")
        assert verdict["min_cosine"] > 1 - 1e-9


def test_no_torch_is_needed(artifact):
    done = run_without_torch("-m", "pmm", "selftest", artifact, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout


def test_what_a_client_wrote_is_judged(artifact, theirs, tmp_path):
    right, bgr = theirs
    np.savetxt(tmp_path / "right.csv", right, delimiter=",")
    np.save(tmp_path / "bgr.npy", bgr)
    done = selftest(artifact, "--embeddings", tmp_path / "right.csv")
    assert (done.returncode, done.stderr) == (0, "")
    done = selftest(artifact, "--embeddings", tmp_path / "bgr.npy")
    assert done.returncode == 1
    first, advice = done.stdout.splitlines()
    assert "FAILED" in first
    assert "bgr" in first
    assert "RGB" in advice
    done = selftest(artifact, "--embeddings", tmp_path / "bgr.npy", "--precision", "int8", "--json")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["mistakes"], verdict["precision"]) == (1, ["bgr"], "int8")
    assert verdict["tolerance"]["min_cosine"] == 0.98


def test_the_crops_become_files_for_clients_that_read_files(artifact, tmp_path):
    folder = tmp_path / "crops"
    assert selftest(artifact, "--write-images", folder).returncode == 0
    expected = read_selftest(artifact, sha256(artifact)).vectors.images
    paths = sorted(folder.iterdir())
    assert len(paths) == len(expected)
    for path, pixels in zip(paths, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert selftest(artifact, "--write-images", folder).returncode == 0, "again, into the same folder"
    (folder / "mine.png").touch()
    assert_one_line_error(selftest(artifact, "--write-images", folder), str(folder), "mine.png")


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        (np.zeros((3, 384)), ("3 embeddings", "4 crops", "crop-3.png")),
        (np.zeros((4, 128)), ("128", "[4, 384]")),
        (np.full((4, 384), np.nan), ("row 0", "NaN")),
        (np.full((4, 384), 1e200), ("row 0", "float32")),
    ],
)
def test_embeddings_that_cannot_be_judged(artifact, tmp_path, rows, facts):
    np.save(tmp_path / "theirs.npy", rows)
    done = selftest(artifact, "--embeddings", tmp_path / "theirs.npy")
    assert_one_line_error(done, str(tmp_path / "theirs.npy"), *facts)
    assert done.returncode == 1


def test_files_that_are_missing_or_of_another_artifact(artifact, exported, tmp_path):
    done = selftest(tmp_path / "nothing.onnx")
    assert_one_line_error(done, "nothing.onnx", "does not exist")
    (tmp_path / "best.pth").touch()
    assert_one_line_error(selftest(tmp_path / "best.pth"), "best.pth", "checkpoint", "pmm export onnx")
    assert_one_line_error(selftest(tmp_path), str(tmp_path), "bundle.json")
    as_json, as_npz = selftest_paths(artifact)
    facts = json.loads(as_json.read_text())
    as_json.write_text(json.dumps(facts | {"artifact_sha256": "f" * 64}))
    assert_one_line_error(selftest(artifact), str(as_json), "f" * 12, sha256(artifact)[:12])
    as_json.write_text(json.dumps(facts))
    as_npz.write_bytes(as_npz.read_bytes()[:-1])
    assert_one_line_error(selftest(artifact), str(as_npz), "changed")
    as_npz.unlink()
    assert_one_line_error(selftest(artifact), str(artifact), as_npz.name, "export the file again")


def test_command_lines_that_make_no_sense(artifact, tmp_path):
    np.save(tmp_path / "theirs.npy", np.zeros((4, 384)))
    for words, facts in (
        (("--embeddings", tmp_path / "theirs.npy", "--backend", "openvino"), ("--embeddings", "--backend")),
        (("--write-images", tmp_path / "x", "--json"), ("--write-images", "--json")),
        (("--write-images", tmp_path / "x", "--embeddings", tmp_path / "theirs.npy"), ("--write-images",)),
        (("--backend", "onxruntime"), ("onnxruntime",)),
        (("--precision", "fp64"), ("--precision", "fp16")),
    ):
        done = selftest(artifact, *words)
        assert_one_line_error(done, *facts)
        assert done.returncode == 2
    assert not (tmp_path / "x").exists()
