"""A gallery made anew by another model: all crops or a line, nothing mixed, and the old one whole until the end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pmm.export.options import ExportOptions
from pmm.gallery import embed_job, upgrade
from pmm.gallery.describe import describe_gallery
from pmm.gallery.embed_folder import embed as embed_folder
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.thresholds import Threshold
from pmm.gallery.unfinished import JOB_FILE, WORK_FOLDER
from pmm.gallery.upgrade import GalleryUpgrade
from pmm.runtime.open import open_runner
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import CannotWrite, InvalidFile
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.refusals import refuses


@pytest.fixture(scope="module")
def newer(shared):
    """Another model: of norm 1, compared by cosine."""
    return shared.onnx(ExportOptions(normalize=True), verify=False)


@pytest.fixture
def old(exported, crops, tmp_path):
    return embed_folder(exported, crops, tmp_path / "g", names="market1501", device="cpu").path


def run(gallery, artifact, *flags):
    return run_here("-m", "pmm", "gallery", "upgrade", gallery, "--to", artifact, "--device", "cpu", *flags)


def is_made_by(path, artifact, crops, tmp_path):
    """The gallery at `path` is what embedding the folder with the artifact gives."""
    reference = embed_folder(artifact, crops, tmp_path / "reference", names="market1501", device="cpu")
    gallery = Gallery.open(path)
    order = [np.argsort(each.column("id").astype(str)) for each in (gallery, reference)]
    for name in ("id", *reference.columns):
        assert gallery.column(name)[order[0]].tolist() == reference.column(name)[order[1]].tolist(), name
    found, expected = (each.embeddings()[rows] for each, rows in zip((gallery, reference), order, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert gallery.source == reference.source
    assert gallery.metric == reference.metric
    assert not gallery.verify()
    shutil.rmtree(tmp_path / "reference")
    return True


def test_a_gallery_is_replaced_at_the_end(old, newer, crops, tmp_path):
    held = Gallery.open(old)
    before = held.embeddings()
    done = run(old, newer)
    assert f"{old}: 9 crops embedded; 9 crops, 384 dimensions" in done.stdout, done.stderr
    assert is_made_by(old, newer, crops, tmp_path)
    assert not (old / WORK_FOLDER).exists()
    np.testing.assert_array_equal(held.embeddings(), before)
    assert held.metric == "euclidean", "a reader keeps the gallery that it opened"
    assert_one_line_error(run(old, newer), "this model made it")


def test_a_new_folder_leaves_the_old_gallery_as_it_is(old, newer, exported, crops, tmp_path):
    done = run(old, newer, "-o", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert is_made_by(tmp_path / "new", newer, crops, tmp_path)
    assert is_made_by(old, exported, crops, tmp_path)
    assert not (tmp_path / "new" / JOB_FILE).exists()
    assert_one_line_error(run(old, newer, "-o", tmp_path / "new"), "new: it is a gallery already")
    assert_one_line_error(run(old, newer, "-o", crops), "crops: it holds ")


def test_crops_that_are_gone_are_named_and_left_out_if_that_is_wanted(
    old, newer, exported, crops, tmp_path, monkeypatch
):
    gone = sorted(crops.iterdir())[2:4]
    kept = tmp_path / "kept"
    shutil.copytree(crops, kept)
    for path in gone:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("pmm.runtime.runner_flags.open_runner", lambda *_, **__: pytest.fail("a model was opened"))
        done = run(old, newer)
        assert_one_line_error(
            done, f"2 images cannot be read: {gone[0].name} (it does not exist)", gone[1].name, "--folder"
        )
    done = run(old, newer, "--folder", kept, "-o", tmp_path / "moved")
    assert "9 crops embedded; 9 crops" in done.stdout, done.stderr
    assert Gallery.open(tmp_path / "moved").folder == str(kept)
    done = run(old, newer, "--skip-bad-images")
    assert "7 crops embedded, 2 left out; 7 crops" in done.stdout, done.stderr
    assert [path.name in done.stderr for path in gone] == [True, True]
    assert is_made_by(old, newer, crops, tmp_path)
    for path in crops.iterdir():
        path.unlink()
    assert_one_line_error(run(old, exported, "--skip-bad-images"), "none of its 7 crops can be read")


def test_an_image_that_is_damaged_stops_it_and_the_old_one_stays(old, newer, exported, crops, tmp_path):
    spoiled = sorted(crops.iterdir())[4]
    content = spoiled.read_bytes()
    spoiled.write_bytes(content[:700])
    assert_one_line_error(run(old, newer), f"1 image cannot be read: {spoiled.name}")
    assert Gallery.open(old).metric == "euclidean"
    done = run(old, newer, "--skip-bad-images")
    assert "8 crops embedded, 1 left out; 8 crops" in done.stdout, done.stderr
    assert Gallery.open(old).metric == "cosine"


def test_crops_of_a_second_folder_that_was_moved_are_found_again(old, newer, exported, people, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    shutil.copy(sorted((people / "bounding_box_test").glob("*.jpg"))[30], second)
    add = {"append": True, "names": "market1501", "device": "cpu"}
    embed_folder(exported, second, old, **add)
    second.rename(tmp_path / "moved")
    assert_one_line_error(run(old, newer), "1 image cannot be read", "pmm embed --append records where they are")
    embed_folder(exported, tmp_path / "moved", old, **add)
    assert "10 crops embedded; 10 crops" in run(old, newer).stdout


def test_thresholds_stay_where_they_hold_and_are_told_where_not(old, newer, trained, tmp_path):
    gallery = Gallery.open(old)
    own = Threshold(
        fmr=1e-3, distance=3.0, kind="given", precision="fp32", stored="fp32",
        checkpoint_sha256=gallery.source.checkpoint_sha256,
    )  # fmt: skip
    gallery.set_thresholds([own])
    done = run(old, trained, "-o", tmp_path / "same")
    assert Gallery.open(tmp_path / "same").thresholds == (own,), done.stderr
    assert "threshold" not in done.stderr
    done = run(old, newer)
    assert not Gallery.open(old).thresholds, "another metric has other distances"
    assert "1 threshold of the old embeddings" in done.stderr
    assert f"pmm threshold {old}" in done.stderr


@pytest.fixture
def interrupted(old, newer, monkeypatch):
    """After the second of five batches, each a chunk of its own."""
    monkeypatch.setattr(embed_job, "CHUNK_CROPS", 2)
    calls, embed = [], OrtRunner._embed

    def fail(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(self, images)

    with monkeypatch.context() as patch, open_runner(newer, device="cpu") as runner:
        patch.setattr(OrtRunner, "_embed", fail)
        with pytest.raises(KeyboardInterrupt):
            GalleryUpgrade(gallery=old, artifact=newer).run(runner, batch_size=2)
    assert len(Gallery.open(old / WORK_FOLDER)) == 4
    return old


def test_an_interrupted_upgrade_goes_on_where_it_was(interrupted, newer, exported, crops, tmp_path):
    assert is_made_by(interrupted, exported, crops, tmp_path)
    done = run(interrupted, newer)
    assert "5 crops embedded, 4 were there; 9 crops" in done.stdout, done.stderr
    assert is_made_by(interrupted, newer, crops, tmp_path)


def test_an_interrupted_upgrade_is_told_and_can_be_cancelled(old, newer, monkeypatch):
    def stop(*_):
        (old / JOB_FILE).write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upgrade, "compact", stop)
        done = run(old, newer)
    assert done.returncode == 130
    assert "note: the gallery is as it was; the same command goes on" in done.stderr
    assert f"pmm gallery upgrade {old} --abort" in done.stderr
    facts = describe_gallery(old)
    assert facts["unfinished"] == ["pmm embed", "pmm gallery upgrade"]
    with Gallery.open(old / WORK_FOLDER).writer():
        assert_one_line_error(run_here("-m", "pmm", "gallery", "upgrade", old, "--abort"), "in use by another")
    assert (old / WORK_FOLDER).exists()
    done = run_here("-m", "pmm", "gallery", "upgrade", old, "--abort")
    assert done.returncode == 0, done.stderr
    assert not (old / WORK_FOLDER).exists()
    assert describe_gallery(old)["unfinished"] == []
    assert len(Gallery.open(old)) == 9
    done = run_here("-m", "pmm", "gallery", "upgrade", old, "--abort")
    assert (done.returncode, "nothing to cancel" in done.stdout) == (0, True)


def test_upgrading_and_cancelling_exclude_each_other(old, newer):
    for words, facts in (((), ("--to MODEL", "--abort")), (("--abort", "--to", newer), ("--abort", "--to"))):
        done = run_here("-m", "pmm", "gallery", "upgrade", old, *words)
        assert_one_line_error(done, *facts)
        assert done.returncode == 2


def test_what_an_interrupted_upgrade_to_another_model_left_is_not_used(interrupted, newer, trained, crops, tmp_path):
    done = run(interrupted, trained)
    assert "9 crops embedded; 9 crops" in done.stdout, done.stderr
    assert is_made_by(interrupted, trained, crops, tmp_path)


def test_what_others_change_meanwhile_is_in_the_new_one(old, newer, exported, people, crops, tmp_path, monkeypatch):
    """Between the last crop and the exchange a crop comes, one goes, and one is embedded again."""
    first, second = sorted(crops.iterdir())[:2]
    rounds, follow = [], GalleryUpgrade._follow

    def change(runner, table, *args, **options):
        yield from embed_job.embedded_chunks(runner, table, *args, **options)
        if len(rounds) == 1:
            rounds.append("changed")
            first.unlink()
            Gallery.open(old).remove([first.name])
            shutil.copy(sorted((people / "bounding_box_test").glob("*.jpg"))[30], crops / "0100_c1s1_000001_00.jpg")
            shutil.copy(sorted((people / "bounding_box_test").glob("*.jpg"))[31], second)
            embed_folder(exported, crops, old, append=True, names="market1501", device="cpu")

    monkeypatch.setattr(GalleryUpgrade, "_follow", lambda *args: (rounds.append("round"), follow(*args))[1])
    monkeypatch.setattr(upgrade, "embedded_chunks", change)
    done = run(old, newer)
    assert "11 crops embedded; 9 crops" in done.stdout, done.stderr
    assert is_made_by(old, newer, crops, tmp_path)


def test_a_killed_exchange_is_finished_or_not_begun(old, newer, crops, tmp_path, monkeypatch):
    """Whatever was killed at the end: the same command ends well, and the gallery is one or the other until then."""
    with monkeypatch.context() as patch:
        patch.setattr(upgrade, "compact", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(old, newer).returncode == 130
    assert Gallery.open(old).metric == "euclidean"
    done = run(old, newer)
    assert "0 crops embedded, 9 were there; 9 crops" in done.stdout, done.stderr
    shutil.copytree(old, tmp_path / "left")
    (tmp_path / "left").rename(old / WORK_FOLDER)
    assert_one_line_error(run(old, newer), "this model made it")
    assert not (old / WORK_FOLDER).exists()
    assert is_made_by(old, newer, crops, tmp_path)


def test_what_cannot_be_upgraded_is_refused(newer, old, tmp_path):
    Gallery.create(tmp_path / "foreign", np.eye(3), ["a", "b", "c"])
    with refuses(InvalidFile, "no column path", "pmm embed", path=tmp_path / "foreign"):
        GalleryUpgrade(gallery=tmp_path / "foreign", artifact=newer).check()
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none.onnx"):
        GalleryUpgrade(gallery=old, artifact=tmp_path / "none.onnx").check()
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none"):
        GalleryUpgrade(gallery=tmp_path / "none", artifact=newer).check()
    with (
        Gallery.open(old).writer(),
        open_runner(newer, device="cpu") as runner,
        refuses(CannotWrite, "in use by another process", path=old),
    ):
        GalleryUpgrade(gallery=old, artifact=newer).run(runner)
    assert Gallery.open(old).metric == "euclidean"


@pytest.mark.slow
def test_an_upgrade_that_is_killed_again_and_again_ends_with_every_crop_of_one_model(exported, newer, people, tmp_path):
    """SIGKILL after each few crops, and at the exchange; the old gallery is whole until it is the new one."""
    script = (
        "import sys, time; from pathlib import Path; from pmm.gallery import embed_job; embed_job.CHUNK_CROPS = 20\n"
        "from pmm.gallery.upgrade import GalleryUpgrade; from pmm.runtime.open import open_runner\n"
        "job = GalleryUpgrade(gallery=Path(sys.argv[1]), artifact=Path(sys.argv[2]))\n"
        "with open_runner(sys.argv[2], device='cpu') as runner: job.check(), job.run(runner, batch_size=10)\n"
    )
    crops = people / "bounding_box_test"
    old = embed_folder(exported, crops, tmp_path / "g", names="market1501", device="cpu")
    before, rng, seen = old.embeddings(), np.random.default_rng(0), [0]
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-c", script, str(old.path), str(newer)], cwd=ROOT)
        while process.poll() is None and progress(old.path) == seen[-1]:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = Gallery.open(old.path)
        assert not now.verify()
        if now.metric == "cosine":
            break
        np.testing.assert_array_equal(now.embeddings(), before)
        seen.append(progress(old.path))
    assert seen == sorted(seen)
    assert len(set(seen)) > 4, "it was killed between chunks"
    assert is_made_by(old.path, newer, crops, tmp_path)


def progress(gallery):
    """Crops that are embedded; -1 while what is complete is removed."""
    work = gallery / WORK_FOLDER
    try:
        return len(Gallery.open(work)) if (work / "manifest.json").exists() else 0
    except InvalidFile:
        return -1
