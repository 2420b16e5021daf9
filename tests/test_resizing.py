"""Everything that embeds files or pixels resizes them as the model's contract says, not as our training does."""

import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import pmm
from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.onnx_file import embed_manifest, read_onnx
from pmm.bench.worker import WorkerSession
from pmm.data.readers import read_dataset
from pmm.data.resize_opencv import resize_as_opencv
from pmm.embedding.embed import embed_samples
from pmm.export.calibration import calibration_crops, calibration_files
from pmm.export.options import ExportOptions
from pmm.export.parity_check import verification_crops
from pmm.runtime.open import open_runner
from pmm.utils.files import sha256

COLOUR = (124, 116, 104)


@pytest.fixture(scope="module")
def artifact(exported, tmp_path_factory):
    """An ONNX file whose manifest asks for OpenCV's bilinear, without antialias, and padding."""
    file, out = read_onnx(exported), tmp_path_factory.mktemp("padded") / "model.onnx"
    preprocessing = dataclasses.replace(file.manifest.preprocessing, antialias=False, padding=COLOUR)
    manifest = dataclasses.replace(file.manifest, preprocessing=preprocessing, sha256="", parity=None)
    del file.proto.metadata_props[:]
    embed_manifest(file.proto, manifest)
    out.write_bytes(file.proto.SerializeToString())
    manifest_path(out).write_text(dataclasses.replace(manifest, sha256=sha256(out)).to_json())
    return out


@pytest.fixture(scope="module")
def odd_people(people, tmp_path_factory):
    """The data set with crops of many sizes, tall and wide."""
    root = tmp_path_factory.mktemp("odd") / "data"
    shutil.copytree(people, root)
    draw = random.Random(0)
    for path in sorted(root.rglob("*.jpg")):
        size = draw.randint(30, 150), draw.randint(60, 300)
        Image.open(path).resize(size).save(path, quality=95)
    return root


def by_hand(path):
    """128 x 64: resized as OpenCV does, in the middle of the colour."""
    pixels = np.asarray(Image.open(path))
    height, width = pixels.shape[:2]
    inner = (
        (128, max(1, round(width * 128 / height))) if height > 2 * width else (max(1, round(height * 64 / width)), 64)
    )
    crop = np.full((128, 64, 3), COLOUR, np.uint8)
    top, left = (128 - inner[0]) // 2, (64 - inner[1]) // 2
    crop[top : top + inner[0], left : left + inner[1]] = resize_as_opencv(pixels, *inner)
    return crop


def test_all_ways_to_embed_a_crop_obey_the_contract(artifact, odd_people, tmp_path):
    samples = read_dataset("synthetic", odd_people).query[:12]
    paths = [sample.path for sample in samples]
    crops = np.stack([by_hand(path) for path in paths])
    with open_runner(artifact) as runner:
        expected = runner(crops)
        wrong = runner(pmm.load_crops(paths, 128, 64))
        assert (np.linalg.norm(wrong - expected, axis=1) > 1e-2).all(), "the contract makes no difference here"
        found = {
            "files": runner(pmm.load_crops(paths, runner.preprocessing)),
            "pixels": runner([np.asarray(Image.open(path)) for path in paths]),
            "pixels from files": runner(pmm.load_crops(paths)),
            "evaluate": embed_samples(runner, samples),
        }
    (tmp_path / "crops").mkdir()
    for number, path in enumerate(paths):
        shutil.copy(path, tmp_path / "crops" / f"{number:02}.jpg")
    gallery = pmm.embed(artifact, tmp_path / "crops", tmp_path / "gallery")
    found["embed"] = gallery.embeddings()
    session = WorkerSession(lambda done: None)
    session.open(str(artifact), backend="ort-cpu", precision="fp32", device="cpu", cuda_graph=None, threads=0)
    (tmp_path / "paths.json").write_text(json.dumps(list(map(str, paths))))
    session.embed(str(tmp_path / "paths.json"), str(tmp_path / "bench.npy"))
    found["bench"] = np.load(tmp_path / "bench.npy")
    assert np.array_equal(session._crops(list(map(str, paths))), crops), "what the bench times"
    for way, embeddings in found.items():
        assert np.array_equal(embeddings, expected), way
    for number in (0, 5, 11):
        ids, distances = pmm.search(gallery, paths[number], k=1)
        assert ids.tolist() == [f"{number:02}.jpg"]
        assert distances[0] == pytest.approx(0, abs=1e-3)


def test_exports_are_verified_and_calibrated_on_crops_that_obey_the_contract(artifact, odd_people):
    size = read_onnx(artifact).manifest.preprocessing
    split = read_dataset("synthetic", odd_people)
    by_content = {by_hand(sample.path).tobytes() for sample in (*split.query, *split.gallery)}
    crops = verification_crops("synthetic", str(odd_people), size)
    assert all(crop.tobytes() in by_content for crop in crops)
    source = SimpleNamespace(preprocessing=size, data=SimpleNamespace(name="synthetic", root=str(odd_people)))
    crops = calibration_crops(source, ExportOptions(precision="int8", target="cpu", calibration_images=32))
    assert np.array_equal(crops, [by_hand(path) for path in calibration_files(str(odd_people), "synthetic", 32)])
