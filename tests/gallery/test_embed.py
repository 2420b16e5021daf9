"""A folder of crops becomes an index: every image once, in order, read as everywhere else; or one line and nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm.data.crops import load_crop, load_crops
from pmm.gallery import embed as gallery
from pmm.gallery.embed import contract_of, embed_files, embed_folder, images_below
from pmm.gallery.index import Index
from pmm.runtime.open import BACKENDS, open_runner
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses
from tests.without_torch import run_all_without_torch


@pytest.fixture
def artifact(exported):
    return exported


@pytest.fixture
def crops(people, tmp_path):
    """A few crops in a folder that may be changed."""
    folder = tmp_path / "crops"
    (folder / "camera2").mkdir(parents=True)
    for number, path in enumerate(sorted((people / "query").glob("*.jpg"))[:7]):
        shutil.copy(path, folder / ("camera2" if number > 4 else "") / path.name)
    return folder


def embed(artifact, folder, out, *more, **env):
    return run_here("-m", "pmm", "embed", artifact, folder, "-o", out, *more, **env)


def test_torch_and_onnx_runtime_write_the_same_index(trained, artifact, crops, tmp_path):
    found = {}
    for model in (trained, artifact):
        done = embed(model, crops, tmp_path / "out.npz", "--device", "cpu", "--batch-size", "3", "--threads", "1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        backend = "torch in fp32 on cpu" if model == trained else "ort-cpu in fp32 on cpu"
        for text in ("out.npz: 7 images, 384 dimensions", "images/s", backend):
            assert text in done.stdout
        found[model] = Index.load(tmp_path / "out.npz")
    reference, index = found[trained], found[artifact]
    np.testing.assert_allclose(index.embeddings, reference.embeddings, rtol=1e-4, atol=1e-4)
    assert index.paths == reference.paths == tuple(sorted(index.paths))
    assert sum(path.startswith("camera2/") for path in index.paths) == 2
    assert [index.file(row) for row in range(7)] == [crops / path for path in index.paths]
    assert reference.contract.checkpoint_sha256 == index.contract.checkpoint_sha256 == sha256(trained)
    assert reference.contract.artifact_sha256 == sha256(trained)
    assert index.contract.artifact_sha256 == sha256(artifact)
    assert not reference.contract.differences(index.contract)
    with open_runner(artifact) as runner:
        straight = runner(load_crops([crops / path for path in index.paths], 128, 64))
    np.testing.assert_allclose(index.embeddings, straight, rtol=1e-5, atol=1e-5)


def test_a_backend_is_chosen_by_name_and_the_function_makes_what_the_command_writes(artifact, crops, tmp_path):
    pytest.importorskip("openvino")
    done = embed(artifact, crops, tmp_path / "out.npz", "--backend", "openvino")
    assert "openvino in fp32 on cpu" in done.stdout, done.stderr
    index = gallery.embed(artifact, crops, backend="openvino", batch_size=64)
    index.save(tmp_path / "same.npz")
    assert (tmp_path / "same.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()
    other = gallery.embed(artifact, str(crops), device="cpu", threads=1)
    np.testing.assert_allclose(index.embeddings, other.embeddings, rtol=1e-4, atol=1e-4)
    assert (index.paths, index.contract) == (other.paths, other.contract)
    with refuses(InvalidValue, "batch_size", "1 or more", value=0):
        gallery.embed(artifact, crops, batch_size=0)
    done = embed(artifact, crops, tmp_path / "out.npz", "--backend", "torch-compile")
    assert_one_line_error(done, "model.onnx: it is an ONNX file", "torch-compile", "ort-cpu", "openvino")
    done = embed(artifact, crops, tmp_path / "out.npz", "--backend", "torchscript")
    assert_one_line_error(done, "--backend is 'torchscript'", *BACKENDS)


def test_the_same_folder_gives_the_same_bytes(artifact, crops, tmp_path):
    for name in ("a.npz", "b.npz"):
        assert embed(artifact, crops, tmp_path / name).returncode == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_no_torch_is_needed(artifact, crops, tmp_path):
    out, query = tmp_path / "out.npz", sorted(crops.glob("*.jpg"))[3]
    embedded, found, *told = run_all_without_torch(
        ("-m", "pmm", "embed", artifact, crops, "-o", out),
        ("-m", "pmm", "search", out, "--query", query, "--artifact", artifact, "--top", "2", "--picture",
         tmp_path / "a.png"),
        ("-m", "pmm", "info", artifact),
        ("-m", "pmm", "info", out),
    )  # fmt: skip
    assert embedded.returncode == 0, embedded.stderr
    assert found.stdout.split()[:3] == ["1", "0.0000", query.name], found.stderr
    for done in told:
        assert done.returncode == 0, done.stderr
        assert "versions.torch " in done.stdout


def picture() -> Image.Image:
    """64 x 128, red above and blue below, with a green corner: no two turns of it look alike."""
    image = Image.new("RGB", (64, 128), (200, 30, 30))
    image.paste((20, 40, 180), (0, 70, 64, 128))
    image.paste((10, 200, 60), (0, 0, 20, 20))
    return image


def odd_images(folder: Path) -> dict[str, Image.Image]:
    """Files of every odd kind, and for each the 8-bit upright RGB picture that it shows."""
    folder.mkdir()
    image = picture()
    grey, exif = image.convert("L"), Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    grey.save(folder / "grey.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    alpha = image.copy()
    alpha.putalpha(90)
    alpha.save(folder / "alpha.png")
    Image.fromarray(np.asarray(grey, np.uint16) * 257).save(folder / "deep.png")
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    rgb = grey.convert("RGB")
    return {"grey.png": rgb, "cmyk.jpg": image, "alpha.png": image, "deep.png": rgb, "turned.png": image}


def test_odd_images_are_embedded_as_what_they_show(artifact, tmp_path):
    shown = odd_images(tmp_path / "odd")
    with open_runner(artifact) as runner:
        folder = tmp_path / "odd"
        index = embed_folder(runner, contract_of(artifact, runner), folder, images_below(folder))
        assert index.paths == tuple(sorted(shown))
        plain = runner(np.stack([np.asarray(shown[name]) for name in index.paths]))
        read = runner(np.stack([load_crop(tmp_path / "odd" / name, 128, 64) for name in index.paths]))
        apart = np.linalg.norm(runner(np.asarray(picture().rotate(180))[None]) - runner(np.asarray(picture())[None]))
    np.testing.assert_allclose(index.embeddings, read, rtol=1e-5, atol=1e-5)
    for name, mine, expected in zip(index.paths, index.embeddings, plain, strict=True):
        # a JPEG is a little off; the wrong way up is far off
        assert np.linalg.norm(mine - expected) < (0.2 * apart if name == "cmyk.jpg" else 1e-3), name


def test_images_below_are_sorted_and_hidden_or_foreign_files_left_out(tmp_path):
    kept = ["B.JPG", "a.png", "below/d.bmp", "below/deeper/c.jpeg", "folder.jpg/e.png"]
    for name in (*kept, ".hidden.jpg", ".cache/x.jpg", "below/.x/y.png", "Thumbs.db", "notes.txt", "x.jpg.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "round").symlink_to(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in images_below(tmp_path)] == kept


def test_places_without_images_are_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with refuses(InvalidFile, "no image", path=tmp_path, expected=".jpg"):
        images_below(tmp_path)
    for name in ("none", "notes.txt"):
        with refuses(InvalidFile, path=tmp_path / name, expected="a folder"):
            images_below(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.jpg")
    with refuses(InvalidFile, "no regular file", path=tmp_path / "pipe.jpg"):
        images_below(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "text", "dangling link"])
def test_a_bad_image_is_named_and_nothing_is_written(artifact, crops, tmp_path, kind):
    bad = crops / "camera2" / "bad.jpg"
    if kind == "dangling link":
        bad.symlink_to(tmp_path / "gone.jpg")
    else:
        bad.write_bytes(b"" if kind == "empty" else b"hello")
    before = sorted(os.listdir(tmp_path))
    done = embed(artifact, crops, tmp_path / "out.npz")
    assert_one_line_error(done, "camera2/bad.jpg: not a readable image")
    assert not done.stdout
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 20 GiB", "Failed to allocate memory for"])
def test_a_batch_too_large_for_the_memory_is_one_line(artifact, crops, tmp_path, monkeypatch, said):
    def full(self, images):
        raise RuntimeError(f"{said}\nmore")

    monkeypatch.setattr(OrtRunner, "_embed", full)
    done = embed(artifact, crops, tmp_path / "gallery.npz")
    assert_one_line_error(done, f"images at once need too much memory ({said}", "use a smaller --batch-size")

    def broken(self, images):
        raise RuntimeError("a bug")

    monkeypatch.setattr(OrtRunner, "_embed", broken)
    with open_runner(artifact) as runner, pytest.raises(RuntimeError, match="a bug"):
        embed_files(runner, images_below(crops))


def test_nan_is_refused_by_name_and_the_old_index_kept(artifact, crops, tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    assert embed(artifact, crops, out).returncode == 0
    old, run = out.read_bytes(), OrtRunner._embed

    def broken(self, images):
        embeddings = run(self, images)
        embeddings[1, 5] = np.inf
        return embeddings

    monkeypatch.setattr(OrtRunner, "_embed", broken)
    names = Index.load(out).paths
    done = embed(artifact, crops, out, "--batch-size", "5")
    assert_one_line_error(done, "2 of 7 embeddings hold NaN or Inf", f"{names[1]}, {names[6]}", "backend is broken")
    assert out.read_bytes() == old


@pytest.mark.parametrize("moment", ["embedding", "writing"])
def test_an_interrupt_leaves_nothing(artifact, crops, tmp_path, monkeypatch, moment):
    before = sorted(os.listdir(tmp_path))

    def stop(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(*((OrtRunner, "_embed", stop) if moment == "embedding" else (zipfile.ZipFile, "open", stop)))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        done = embed(artifact, crops, tmp_path / "out.npz")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (done.returncode, done.stdout) == (130, "")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_one_line_and_keeps_the_old_index(artifact, crops, tmp_path, monkeypatch):
    (tmp_path / "out.npz").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_one_line_error(embed(artifact, crops, tmp_path / "out.npz"), "out.npz", "No space left on device")
    assert (tmp_path / "out.npz").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == before


def test_wrong_use_is_one_line_before_any_work(artifact, crops, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pmm.commands.embed.open_runner", lambda *_, **__: pytest.fail("a model was opened for nothing")
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out.npz"
    assert_one_line_error(embed(artifact, empty, out), f"{empty}: it holds no image")
    assert_one_line_error(embed(artifact, tmp_path / "none", out), "none: No such file or directory")
    assert_one_line_error(embed(artifact, crops, tmp_path / "out.txt"), "ends in .npz")
    assert_one_line_error(embed(artifact, crops, out, "--batch-size", "0"), "--batch-size is 0")
    assert_one_line_error(embed(artifact, crops, out, "--threads", "-1"), "--threads is -1")
    assert_one_line_error(embed(artifact, crops, out, "--size", "3"), "unknown flag --size")
    assert_one_line_error(run_here("-m", "pmm", "embed", artifact, crops), "--out")
    (tmp_path / "folder.npz").mkdir()
    assert_one_line_error(embed(artifact, crops, tmp_path / "folder.npz"), "it is a folder")
    assert not out.exists()


def test_an_artifact_of_no_known_kind_is_one_line(crops, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"bytes")
    done = embed(tmp_path / "model.bin", crops, tmp_path / "out.npz")
    assert_one_line_error(done, "model.bin: neither its content nor its name", ".pth", ".onnx", ".plan", ".pt2")
    assert_one_line_error(embed(tmp_path / "none.onnx", crops, tmp_path / "out.npz"), "none.onnx: it does not exist")
    assert not (tmp_path / "out.npz").exists()
