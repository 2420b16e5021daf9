"""A folder of crops becomes a gallery: every image once, in order, read as everywhere else; or one line and nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm.data.crops import load_crop, load_crops
from pmm.embedding.embed import embed_files
from pmm.gallery.crop_files import images_below
from pmm.gallery.embed_folder import embed as embed_folder
from pmm.gallery.gallery import Gallery
from pmm.runtime.open import BACKENDS, open_runner
from pmm.runtime.ort import OrtRunner
from pmm.utils.errors import InvalidValue
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


def paths_of(gallery):
    return gallery.column("path").tolist()


def test_torch_and_onnx_runtime_write_the_same_gallery(trained, artifact, crops, tmp_path):
    found = {}
    for model in (trained, artifact):
        out = tmp_path / f"out-{model.stem}"
        done = embed(model, crops, out, "--device", "cpu", "--batch-size", "3", "--threads", "1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        backend = "torch in fp32 on cpu" if model == trained else "ort-cpu in fp32 on cpu"
        for text in (f"{out}: 7 images added; 7 crops, 384 dimensions, stored in fp32", "images/s", backend):
            assert text in done.stdout
        found[model] = Gallery.open(out)
    reference, gallery = found[trained], found[artifact]
    np.testing.assert_allclose(gallery.embeddings(), reference.embeddings(), rtol=1e-4, atol=1e-4)
    paths = paths_of(gallery)
    assert paths == paths_of(reference) == sorted(paths) == gallery.column("id").tolist()
    assert sum(path.startswith("camera2/") for path in paths) == 2
    assert all((Path(gallery.folder) / path).samefile(crops / path) for path in paths)
    assert reference.source.checkpoint_sha256 == gallery.source.checkpoint_sha256 == sha256(trained)
    assert reference.source.artifact_sha256 == sha256(trained)
    assert gallery.source.artifact_sha256 == sha256(artifact)
    assert not reference.source.differences(gallery.source)
    with open_runner(artifact) as runner:
        straight = runner(load_crops([crops / path for path in paths], 128, 64))
    np.testing.assert_allclose(gallery.embeddings(), straight, rtol=1e-5, atol=1e-5)


def test_a_backend_is_chosen_by_name_and_the_function_makes_what_the_command_writes(artifact, crops, tmp_path):
    pytest.importorskip("openvino")
    done = embed(artifact, crops, tmp_path / "out", "--backend", "openvino")
    assert "openvino in fp32 on cpu" in done.stdout, done.stderr
    gallery = embed_folder(artifact, crops, tmp_path / "same", backend="openvino", batch_size=64)
    assert contents(tmp_path / "same") == contents(tmp_path / "out")
    other = embed_folder(artifact, str(crops), tmp_path / "other", device="cpu", threads=1)
    np.testing.assert_allclose(gallery.embeddings(), other.embeddings(), rtol=1e-4, atol=1e-4)
    assert paths_of(gallery) == paths_of(other)
    with refuses(InvalidValue, "batch_size", "1 or more", value=0):
        embed_folder(artifact, crops, tmp_path / "none", batch_size=0)
    done = embed(artifact, crops, tmp_path / "none", "--backend", "torch-compile")
    assert_one_line_error(done, "model.onnx: it is an ONNX file", "torch-compile", "ort-cpu", "openvino")
    done = embed(artifact, crops, tmp_path / "none", "--backend", "torchscript")
    assert_one_line_error(done, "--backend is 'torchscript'", *BACKENDS)
    assert not (tmp_path / "none").exists()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_folder_gives_the_same_bytes(artifact, crops, tmp_path):
    for name in ("a", "b"):
        assert embed(artifact, crops, tmp_path / name).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_no_torch_is_needed(artifact, crops, tmp_path):
    out, query = tmp_path / "out", sorted(crops.glob("*.jpg"))[3]
    embedded, found, *told = run_all_without_torch(
        ("-m", "pmm", "embed", artifact, crops, "-o", out),
        ("-m", "pmm", "search", out, "--query", query, "--top", "2", "--picture", tmp_path / "a.png"),
        ("-m", "pmm", "info", artifact),
        ("-m", "pmm", "info", out),
    )  # fmt: skip
    assert embedded.returncode == 0, embedded.stderr
    assert found.stdout.splitlines()[1].split() == ["1", "0.0000", query.name], found.stderr
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
    gallery = embed_folder(artifact, tmp_path / "odd", tmp_path / "out")
    paths = paths_of(gallery)
    assert paths == sorted(shown)
    with open_runner(artifact) as runner:
        plain = runner(np.stack([np.asarray(shown[name]) for name in paths]))
        read = runner(np.stack([load_crop(tmp_path / "odd" / name, 128, 64) for name in paths]))
        apart = np.linalg.norm(runner(np.asarray(picture().rotate(180))[None]) - runner(np.asarray(picture())[None]))
    np.testing.assert_allclose(gallery.embeddings(), read, rtol=1e-5, atol=1e-5)
    for name, mine, expected in zip(paths, gallery.embeddings(), plain, strict=True):
        # a JPEG is a little off; the wrong way up is far off
        assert np.linalg.norm(mine - expected) < (0.2 * apart if name == "cmyk.jpg" else 1e-3), name


BAD = {"empty": b"", "text": b"hello", "cut": b"\xff\xd8\xff\xe0"}


def spoil(crops, kind, name="camera2/bad.jpg"):
    """A bad image; `damaged` ones look right at the beginning."""
    bad = crops / name
    if kind == "dangling link":
        bad.symlink_to(crops / "gone.jpg")
    elif kind == "damaged":
        bad.write_bytes(min(crops.glob("*.jpg")).read_bytes()[:700])
    else:
        bad.write_bytes(BAD[kind])
    return bad


@pytest.mark.parametrize("kind", [*BAD, "dangling link", "damaged"])
def test_a_bad_image_is_named_and_nothing_is_written(artifact, crops, tmp_path, kind):
    spoil(crops, kind)
    before = sorted(os.listdir(tmp_path))
    done = embed(artifact, crops, tmp_path / "out")
    assert_one_line_error(done, f"{crops}: 1 image cannot be read: camera2/bad.jpg (", "--skip-bad-images")
    assert not done.stdout
    assert sorted(os.listdir(tmp_path)) == before


def test_all_bad_images_are_named_before_a_model_is_opened(artifact, crops, tmp_path, monkeypatch):
    monkeypatch.setattr("pmm.runtime.runner_flags.open_runner", lambda *_, **__: pytest.fail("a model was opened"))
    for number, kind in enumerate(BAD):
        spoil(crops, kind, f"{number}.jpg")
    done = embed(artifact, crops, tmp_path / "out")
    assert_one_line_error(done, "3 images cannot be read: 0.jpg (it is empty), 1.jpg (", "2.jpg (")


def test_bad_images_are_left_out_and_listed_if_that_is_wanted(artifact, crops, tmp_path):
    good = [path.relative_to(crops).as_posix() for path in images_below(crops)]
    bad = [spoil(crops, kind, f"camera2/{number}.jpg") for number, kind in enumerate([*BAD, "damaged"])]
    done = embed(artifact, crops, tmp_path / "out", "--skip-bad-images", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert "7 images added, 4 left out; 7 crops" in done.stdout
    assert [line.split(" left out ")[1].split(": ")[0] for line in done.stderr.splitlines()] == list(map(str, bad))
    assert paths_of(Gallery.open(tmp_path / "out")) == good
    plain = embed_folder(artifact, crops, tmp_path / "same", skip_bad_images=True)
    for path in bad:
        path.unlink()
    reference = embed_folder(artifact, crops, tmp_path / "reference")
    np.testing.assert_array_equal(plain.embeddings(), reference.embeddings())


def test_all_bad_images_are_named_whatever_is_wrong_with_them(artifact, crops, tmp_path):
    for number, kind in enumerate([*BAD, "damaged"]):
        spoil(crops, kind, f"{number}.jpg")
    done = embed(artifact, crops, tmp_path / "out")
    assert_one_line_error(done, "4 images cannot be read: ", *(f"{number}.jpg (" for number in range(4)))
    for number in range(3):
        spoil(crops, "damaged", f"{number}.jpg")
    done = embed(artifact, crops, tmp_path / "out", "--batch-size", "1")  # the others are not yet decoded then
    assert_one_line_error(done, "4 images cannot be read: ")
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_of_a_folder_is_told(artifact, crops, tmp_path, caplog):
    (crops / "phone.heic").write_bytes(b"x")
    (crops / "more").symlink_to(tmp_path)
    done = embed(artifact, crops, tmp_path / "out")
    assert "7 images added; 7 crops" in done.stdout, done.stderr
    assert [line.split("left out ")[1].split(";")[0] for line in done.stderr.splitlines()] == [
        "1 image of a kind that is not read: phone.heic", "1 linked folder: more"
    ]  # fmt: skip
    embed_folder(artifact, crops, tmp_path / "again")
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == [
        "phone.heic; convert to JPEG or PNG", "more; copy it, or give it as a folder of its own"
    ]  # fmt: skip


def test_a_folder_of_bad_images_alone_is_refused(artifact, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.jpg").write_bytes(b"")
    done = embed(artifact, tmp_path / "crops", tmp_path / "out", "--skip-bad-images")
    assert_one_line_error(done, "crops: none of its 1 images can be read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 20 GiB", "Failed to allocate memory for"])
def test_a_batch_too_large_for_the_memory_is_one_line(artifact, crops, tmp_path, monkeypatch, said):
    def full(self, images):
        raise RuntimeError(f"{said}\nmore")

    monkeypatch.setattr(OrtRunner, "_embed", full)
    done = embed(artifact, crops, tmp_path / "out")
    assert_one_line_error(done, f"images at once need too much memory ({said}", "use a smaller --batch-size")

    def broken(self, images):
        raise RuntimeError("a bug")

    monkeypatch.setattr(OrtRunner, "_embed", broken)
    with open_runner(artifact) as runner, pytest.raises(RuntimeError, match="a bug"):
        embed_files(runner, images_below(crops))


def test_nan_is_refused_by_name_and_nothing_is_written(artifact, crops, tmp_path, monkeypatch):
    names, run = [path.relative_to(crops).as_posix() for path in images_below(crops)], OrtRunner._embed

    def broken(self, images):
        embeddings = run(self, images)
        embeddings[1, 5] = np.inf
        return embeddings

    monkeypatch.setattr(OrtRunner, "_embed", broken)
    done = embed(artifact, crops, tmp_path / "out", "--batch-size", "5")
    assert_one_line_error(done, "2 of 7 embeddings hold NaN or Inf", f"{names[1]}, {names[6]}", "backend is broken")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_before_the_first_chunk_leaves_nothing(artifact, crops, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))

    def stop(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(OrtRunner, "_embed", stop)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        done = embed(artifact, crops, tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (done.returncode, done.stdout) == (130, "")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_one_line(artifact, crops, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_one_line_error(embed(artifact, crops, tmp_path / "out"), f"{tmp_path / 'out'}", "No space left on device")
    assert sorted(os.listdir(tmp_path)) == before


def test_wrong_use_is_one_line_before_any_work(artifact, crops, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pmm.runtime.runner_flags.open_runner", lambda *_, **__: pytest.fail("a model was opened for nothing")
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    assert_one_line_error(embed(artifact, empty, out), f"{empty}: it holds no image")
    assert_one_line_error(embed(artifact, tmp_path / "none", out), "none: No such file or directory")
    assert_one_line_error(embed(artifact, crops, tmp_path / "out.npz"), "a gallery is a folder", "name it out/")
    assert_one_line_error(embed(artifact, crops, out, "--batch-size", "0"), "--batch-size is 0")
    assert_one_line_error(embed(artifact, crops, out, "--threads", "-1"), "--threads is -1")
    assert_one_line_error(embed(artifact, crops, out, "--size", "3"), "unknown flag --size")
    assert_one_line_error(embed(artifact, crops, out, "--store", "int8"), "--store is 'int8'", "fp32 or fp16")
    assert_one_line_error(embed(artifact, crops, out, "--names", "c("), "--names is 'c('", "regular expression")
    assert_one_line_error(embed(artifact, crops, out, "--names", "market1501-x"), "named groups")
    assert_one_line_error(embed(artifact, crops, out, "--names", "x(?P<camera>.)"), "7 of 7 file names do not match")
    assert_one_line_error(embed(artifact, crops, out, "--metadata", tmp_path / "a.csv"), "a.csv: it does not exist")
    assert_one_line_error(run_here("-m", "pmm", "embed", artifact, crops), "--out")
    assert_one_line_error(embed(artifact, crops, crops), f"{crops}: it holds ")
    assert_one_line_error(embed(artifact, crops, artifact), "model.onnx", "it is a file")
    assert_one_line_error(embed(artifact, crops, out, "--append"), "out: it is no gallery", "leave --append out")
    assert not out.exists()


def test_an_artifact_of_no_known_kind_is_one_line(crops, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"bytes")
    done = embed(tmp_path / "model.bin", crops, tmp_path / "out")
    assert_one_line_error(done, "model.bin: neither its content nor its name", ".pth", ".onnx", ".plan", ".pt2")
    assert_one_line_error(embed(tmp_path / "none.onnx", crops, tmp_path / "out"), "none.onnx: it does not exist")
    assert not (tmp_path / "out").exists()
