"""A gallery grows: what is there is passed over, what changed is embedded again, what was interrupted goes on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pmm.artifacts.artifact import write_thresholds
from pmm.artifacts.measured_thresholds import MeasuredPoint, MeasuredThresholds
from pmm.gallery import embed_job
from pmm.gallery.crop_files import images_below
from pmm.gallery.embed_folder import embed as embed_folder
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.manifest import read_gallery_manifest
from pmm.gallery.unfinished import JOB_FILE
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidFile, InvalidInput, InvalidValue
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.refusals import refuses


@pytest.fixture
def more(people, tmp_path):
    """Some others elsewhere."""
    folder = tmp_path / "more"
    folder.mkdir()
    for path in sorted((people / "bounding_box_test").glob("*.jpg"))[20:24]:
        shutil.copy(path, folder)
    return folder


def embed(artifact, folder, out, *flags):
    done = run_here("-m", "pmm", "embed", artifact, folder, "-o", out, "--device", "cpu", *flags)
    return done


def same(gallery, reference):
    """Whether two galleries have the same crops, whatever their order."""
    order = [np.argsort(each.column("id").astype(str)) for each in (gallery, reference)]
    names = [name for name in reference.columns if name != "path"]
    assert set(gallery.columns) == set(reference.columns)
    for name in ("id", *names):
        assert gallery.column(name)[order[0]].tolist() == reference.column(name)[order[1]].tolist(), name
    vectors = [each.embeddings()[rows] for each, rows in zip((gallery, reference), order, strict=True)]
    np.testing.assert_allclose(*vectors, rtol=1e-5, atol=1e-5)
    return True


def test_an_existing_gallery_is_refused_and_added_to_if_that_is_wanted(exported, crops, more, tmp_path):
    assert embed(exported, crops, tmp_path / "g").returncode == 0
    before = read_gallery_manifest(tmp_path / "g")
    assert_one_line_error(embed(exported, crops, tmp_path / "g"), "g: it is a gallery already", "--append")
    assert read_gallery_manifest(tmp_path / "g") == before
    done = embed(exported, more, tmp_path / "g", "--append")
    assert "4 images added; 13 crops" in done.stdout, done.stderr
    gallery = Gallery.open(tmp_path / "g")
    assert [(tmp_path / "crops" / path).is_file() for path in gallery.column("path")] == [True] * 13
    assert gallery.column("id").tolist()[9:] == [path.name for path in images_below(more)]
    done = embed(exported, crops, tmp_path / "g", "--append")
    assert "0 images added, 9 were there; 13 crops" in done.stdout, done.stderr


def test_files_that_changed_are_embedded_again(exported, crops, tmp_path):
    embed_folder(exported, crops, tmp_path / "g")
    first, second = images_below(crops)[:2]
    other = Image.open(images_below(crops)[5])
    other.save(first, quality=100)
    os.utime(second, ns=(1, 1))
    shutil.copy(images_below(crops)[3], crops / "new.jpg")
    done = embed(exported, crops, tmp_path / "g", "--append")
    assert "3 images added, 2 of them again, as their files had changed, 7 were there; 10 crops" in done.stdout
    assert same(Gallery.open(tmp_path / "g"), embed_folder(exported, crops, tmp_path / "reference"))


def test_crops_of_two_folders_with_the_same_names_are_told_apart(exported, crops, tmp_path):
    embed_folder(exported, crops, tmp_path / "g")
    copy = tmp_path / "copy"
    shutil.copytree(crops, copy)
    name = images_below(crops)[0].name
    with refuses(InvalidInput, f"{name} is the id of {crops / name}", "--prefix", path=tmp_path / "g", index=0):
        embed_folder(exported, copy, tmp_path / "g", append=True)
    gallery = embed_folder(exported, copy, tmp_path / "g", append=True, prefix="site2/")
    assert len(gallery) == 18
    assert gallery.find([f"site2/{name}"])[0] >= 0


def test_a_folder_that_was_moved_is_known_again(exported, crops, tmp_path):
    embed_folder(exported, crops, tmp_path / "g")
    crops.rename(tmp_path / "moved")
    done = embed(exported, tmp_path / "moved", tmp_path / "g", "--append")
    assert "0 images added, 9 were there; 9 crops" in done.stdout, done.stderr
    assert "images/s" not in done.stdout
    gallery = Gallery.open(tmp_path / "g")
    assert gallery.folder == str(tmp_path / "moved"), "where searches and upgrades look for them"
    assert gallery.column("path").tolist() == [path.name for path in images_below(tmp_path / "moved")]


def test_a_second_folder_that_was_moved_is_recorded_without_embedding_it_again(exported, crops, more, tmp_path):
    gallery = embed_folder(exported, crops, tmp_path / "g", names="market1501")
    embed_folder(exported, more, tmp_path / "g", append=True, names="market1501", prefix="b/")
    before = embed_folder(exported, more, tmp_path / "g", append=True, names="market1501", prefix="b/")
    more.rename(tmp_path / "moved")
    done = embed(exported, tmp_path / "moved", tmp_path / "g", "--append", "--names", "market1501", "--prefix", "b/")
    assert "0 images added, 4 were there, 4 of them at another place, which is recorded" in done.stdout, done.stderr
    gallery = Gallery.open(tmp_path / "g")
    assert gallery.folder == str(crops)
    assert all((crops / path).is_file() for path in gallery.column("path"))
    assert same(gallery, before)


def test_crops_whose_files_are_gone_or_broken_are_told_and_pruned_if_that_is_wanted(exported, crops, more, tmp_path):
    embed_folder(exported, crops, tmp_path / "g")
    embed_folder(exported, more, tmp_path / "g", append=True)
    gone, empty, damaged, *rest = images_below(crops)
    gone.unlink()
    empty.write_bytes(b"")
    damaged.write_bytes(damaged.read_bytes()[:700])
    done = embed(exported, crops, tmp_path / "g", "--append", "--skip-bad-images")
    assert "6 were there, 2 left out; 13 crops" in done.stdout, done.stderr
    assert f"note: 3 crops of the gallery can no longer be read in {crops}; --prune" in done.stderr
    done = embed(exported, more, tmp_path / "g", "--append", "--prefix", "b/")
    assert "4 images added; 17 crops" in done.stdout
    assert "no longer" not in done.stderr, "those of another prefix are not this run's"
    Gallery.open(tmp_path / "g").remove([f"b/{path.name}" for path in images_below(more)])
    done = embed(exported, crops, tmp_path / "g", "--append", "--skip-bad-images", "--prune")
    assert "3 removed whose files are gone, 2 left out; 10 crops" in done.stdout, done.stderr
    left = Gallery.open(tmp_path / "g").column("id").tolist()
    assert left == [path.name for path in [*rest, *images_below(more)]]
    assert_one_line_error(embed(exported, crops, tmp_path / "new", "--prune"), "--prune", "--append")


def test_columns_of_the_gallery_are_asked_for(exported, crops, more, tmp_path):
    embed_folder(exported, crops, tmp_path / "g", names="market1501")
    with refuses(InvalidFile, "pid, camera, time", "--names", path=tmp_path / "g"):
        embed_folder(exported, more, tmp_path / "g", append=True)
    with refuses(InvalidFile, "no column floor", path=tmp_path / "g"):
        pattern = r"(?P<pid>\d+)_c(?P<camera>\d+)s(?P<time>\d)_(?P<floor>\d)"
        embed_folder(exported, more, tmp_path / "g", append=True, names=pattern)
    with refuses(InvalidFile, "pid is 'c'", expected="whole number"):
        pattern = r"_(?P<pid>.)(?P<camera>\d+)s(?P<time>\d)"
        embed_folder(exported, more, tmp_path / "g", append=True, names=pattern)
    gallery = embed_folder(exported, more, tmp_path / "g", append=True, names="market1501")
    assert all(
        f"_c{camera}s" in name for camera, name in zip(gallery.column("camera"), gallery.column("id"), strict=True)
    )
    table = tmp_path / "more.csv"
    table.write_text("path,camera,time,pid\n" + "".join(f"{path.name},x,0,7\n" for path in images_below(more)))
    gallery = embed_folder(exported, more, tmp_path / "g", append=True, prefix="t/", metadata=table)
    assert gallery.column("camera").tolist()[-4:] == ["x"] * 4
    assert gallery.column("pid").tolist()[-4:] == [7] * 4


def test_what_cannot_be_added_is_refused_before_a_model_is_loaded(
    exported, trained, crops, more, tmp_path, monkeypatch
):
    gallery = embed_folder(exported, crops, tmp_path / "g")
    monkeypatch.setattr("pmm.gallery.embed_folder.open_runner", lambda *_, **__: pytest.fail("a model was opened"))
    with refuses(InvalidValue, name="store", value="int8", choices=("fp32", "fp16")):
        embed_folder(exported, more, tmp_path / "new", store="int8")
    with refuses(ConflictingOptions, "fp32", options=("--store", "--append")):
        embed_folder(exported, more, tmp_path / "g", append=True, store="fp16")
    manifest = read_gallery_manifest(tmp_path / "g")
    other = dataclasses.replace(gallery.source, checkpoint_sha256="f" * 64, artifact_sha256="f" * 64)
    for artifact in (exported, trained):
        dataclasses.replace(manifest, source=other).write(tmp_path / "g")
        with refuses(InvalidFile, "does not fit the gallery", "ffffffffffff", path=artifact):
            embed_folder(artifact, more, tmp_path / "g", append=True)
    dataclasses.replace(manifest, source=None).write(tmp_path / "g")
    with refuses(InvalidFile, "does not say what made its embeddings", path=tmp_path / "g"):
        embed_folder(exported, more, tmp_path / "g", append=True)
    Gallery.create(tmp_path / "numbers", np.zeros((1, gallery.dim)), [7], source=gallery.source)
    with refuses(InvalidFile, "whole numbers", path=tmp_path / "numbers"):
        embed_folder(exported, more, tmp_path / "numbers", append=True)


def test_another_precision_is_not_mixed_in(exported, crops, more, tmp_path):
    gallery = embed_folder(exported, crops, tmp_path / "g")
    source = dataclasses.replace(gallery.source, precision="int8")
    dataclasses.replace(read_gallery_manifest(tmp_path / "g"), source=source).write(tmp_path / "g")
    with refuses(InvalidFile, "runs in fp32", "made in int8", path=exported):
        embed_folder(exported, more, tmp_path / "g", append=True)
    assert len(Gallery.open(tmp_path / "g")) == 9


def test_fp16_takes_half_and_says_so(exported, crops, tmp_path):
    done = embed(exported, crops, tmp_path / "g", "--store", "fp16")
    assert "stored in fp16" in done.stdout, done.stderr
    gallery = Gallery.open(tmp_path / "g")
    done = embed(exported, crops, tmp_path / "g", "--append")
    assert "9 were there; 9 crops, 384 dimensions, stored in fp16" in done.stdout, done.stderr
    full = embed_folder(exported, crops, tmp_path / "full")
    np.testing.assert_array_equal(gallery.embeddings(), full.embeddings().astype(np.float16).astype(np.float32))


def test_thresholds_of_the_bench_come_with_the_model(exported, crops, tmp_path, caplog):
    for ending in ("", ".json"):
        shutil.copy(f"{exported}{ending}", tmp_path / f"model.onnx{ending}")
    points = tuple(MeasuredPoint(fmr=fmr, distance=20 - 5 * fmr, tpr=0.5 + fmr) for fmr in (1e-2, 1e-3))
    of = {"data": "people", "data_digest": "d", "genuine": 9, "impostor": 9, "points": points}
    for precision, metric in (("fp32", "euclidean"), ("int8", "euclidean")):
        measured = MeasuredThresholds(precision=precision, metric=metric, **of)
        assert write_thresholds(tmp_path / "model.onnx", measured)
    gallery = embed_folder(tmp_path / "model.onnx", crops, tmp_path / "g", device="cpu")
    assert [(each.fmr, each.distance, each.tpr) for each in gallery.thresholds] == [
        (point.fmr, point.distance, point.tpr) for point in points
    ]
    first = gallery.thresholds[0]
    assert (first.kind, first.precision, first.stored, first.data) == ("bench", "fp32", "fp32", "people")
    assert gallery.threshold(1e-3).distance == points[1].distance
    assert "thresholds" not in caplog.text
    half = embed_folder(tmp_path / "model.onnx", crops, tmp_path / "half", store="fp16", device="cpu")
    assert not half.thresholds, "they were measured on embeddings in fp32"
    assert "model.onnx: its thresholds were measured for embeddings in fp32" in caplog.text


@pytest.fixture
def interrupted(exported, crops, tmp_path, monkeypatch):
    """A gallery that was being made when the third batch of two failed, each a chunk of its own."""
    monkeypatch.setattr(embed_job, "CHUNK_CROPS", 2)
    calls, run = [], OrtRunner._embed

    def fail(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(OrtRunner, "_embed", fail)
        done = embed(exported, crops, tmp_path / "g", "--names", "market1501", "--batch-size", "2")
    assert (done.returncode, done.stdout) == (130, "")
    assert "the same command goes on" in done.stderr
    assert len(Gallery.open(tmp_path / "g")) == 4
    return tmp_path / "g"


def test_an_interrupted_run_goes_on_where_it_was(exported, crops, interrupted, tmp_path, monkeypatch):
    seen, run = [], OrtRunner._embed
    monkeypatch.setattr(OrtRunner, "_embed", lambda self, images: seen.append(len(images)) or run(self, images))
    assert (interrupted / JOB_FILE).exists()
    done = embed(exported, crops, interrupted, "--names", "market1501")
    assert "5 images added, 4 were there; 9 crops" in done.stdout, done.stderr
    assert sum(seen) == 5
    assert not (interrupted / JOB_FILE).exists()
    assert same(Gallery.open(interrupted), embed_folder(exported, crops, tmp_path / "reference", names="market1501"))
    assert_one_line_error(embed(exported, crops, interrupted, "--names", "market1501"), "--append")


def test_another_run_does_not_go_on_with_it(exported, trained, crops, more, interrupted):
    for artifact, folder, flags, fact in (
        (exported, crops, (), "--names"),
        (exported, more, ("--names", "market1501"), "folder"),
        (trained, crops, ("--names", "market1501"), "model"),
        (exported, crops, ("--names", "market1501", "--store", "fp16"), "--store"),
    ):
        done = embed(artifact, folder, interrupted, *flags)
        assert_one_line_error(done, f"begun by an interrupted pmm embed with another {fact};", "--append")
    (interrupted / JOB_FILE).write_text("[")
    assert_one_line_error(embed(exported, crops, interrupted, "--names", "market1501"), "with another model, folder")
    assert len(Gallery.open(interrupted)) == 4


def test_another_run_leaves_it_unfinished(exported, crops, more, interrupted):
    done = embed(exported, more, interrupted, "--names", "market1501", "--append")
    assert "4 images added; 8 crops" in done.stdout, done.stderr
    assert (interrupted / JOB_FILE).exists(), "crops of the interrupted run are still missing"
    done = embed(exported, crops, interrupted, "--names", "market1501")
    assert "5 images added, 4 were there; 13 crops" in done.stdout, done.stderr
    assert not (interrupted / JOB_FILE).exists()


def test_the_interrupted_run_is_finished_by_adding_to_it_too(exported, crops, interrupted):
    assert embed(exported, crops, interrupted, "--names", "market1501", "--append").returncode == 0
    assert not (interrupted / JOB_FILE).exists()


def test_a_second_writer_is_refused(exported, crops, more, tmp_path):
    gallery = embed_folder(exported, crops, tmp_path / "g")
    with gallery.writer(), refuses(CannotWrite, "in use by another process", path=tmp_path / "g"):
        embed_folder(exported, more, tmp_path / "g", append=True)


def test_a_bad_image_far_into_the_folder_keeps_what_was_written(exported, crops, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_job, "CHUNK_CROPS", 2)
    content = min(crops.glob("*.jpg")).read_bytes()
    (crops / "zz.jpg").write_bytes(content[:700])
    with refuses(InvalidFile, "1 image cannot be read", "zz.jpg", path=crops):
        embed_folder(exported, crops, tmp_path / "g", batch_size=2)
    assert len(Gallery.open(tmp_path / "g")) == 8
    (crops / "zz.jpg").write_bytes(content)
    assert len(embed_folder(exported, crops, tmp_path / "g", batch_size=2)) == 10


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_every_crop_once(exported, people, tmp_path):
    """SIGKILL at any moment, chunks of a few crops; the same command until it is done."""
    script = (
        "import sys, time; from pmm.gallery import embed_job; embed_job.CHUNK_CROPS = 20\n"
        "from pmm.gallery.embed_folder import embed; from pmm.runtime.ort import OrtRunner\n"
        "run = OrtRunner._embed; OrtRunner._embed = lambda self, images: time.sleep(0.02) or run(self, images)\n"
        "embed(*sys.argv[1:4], names='market1501', batch_size=4, device='cpu')\n"
    )
    folder, out, rng, sizes = people / "bounding_box_test", tmp_path / "g", np.random.default_rng(0), [0]
    for _ in range(60):
        command = [sys.executable, "-c", script, str(exported), str(folder), str(out)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and crops_in(out) == sizes[-1]:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stderr.read() == ""
        sizes.append(crops_in(out))
        assert sizes[-1] == 0 or not Gallery.open(out).verify()
        if sizes[-1] and not (out / JOB_FILE).exists():
            break
    assert sizes == sorted(sizes), "nothing that was written is lost"
    assert len(set(sizes)) > 4, "it was killed between chunks"
    assert same(Gallery.open(out), embed_folder(exported, folder, tmp_path / "reference", names="market1501"))


def crops_in(path):
    return len(Gallery.open(path)) if (path / "manifest.json").exists() else 0
