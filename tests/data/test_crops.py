import contextlib

import numpy as np
import pytest
from PIL import Image

from pmm.config import preset
from pmm.data.crops import iter_crops, load_crop, load_crops, preprocessing_of
from pmm.errors import UserError


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_size_kept_is_pixel_exact_and_resize_is_pils_bilinear(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert np.array_equal(load_crop(path, 20, 10), pixels)
    expected = np.asarray(Image.fromarray(pixels).resize((8, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(load_crop(path, 16, 8), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = save(Image.new("RGB", (6, 8), (200, 200, 200)).convert(mode), tmp_path / f"a.{suffix}")
    crop = load_crop(path, 8, 6)
    assert crop.shape == (8, 6, 3)
    assert crop.dtype == np.uint8
    assert abs(int(crop.mean()) - 200) <= 60


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste((255, 0, 0), (0, 0, 4, 4))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    path = save(image, tmp_path / "a.png", exif=exif)
    crop = load_crop(path, 8, 4)
    assert crop[0, 0].tolist() == [255, 0, 0]
    assert crop[-1, 0].tolist() == [0, 0, 0]


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    whole = save(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), tmp_path / "w.jpg"
    )
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:700])
    for name in ("empty.jpg", "text.jpg", "cut.jpg", "missing.jpg"):
        with pytest.raises(UserError, match=f"{name}: not a readable image") as error:
            load_crop(tmp_path / name, 8, 4)
        assert "\n" not in str(error.value)


def test_16_bit_grey_is_scaled_and_unknown_ranges_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    path = save(Image.fromarray(ramp), tmp_path / "deep.png")
    assert np.abs(load_crop(path, 8, 8)[..., 0].astype(int) - ramp / 257).max() <= 1
    path = save(Image.fromarray(ramp.astype(np.float32)), tmp_path / "float.tiff")
    with pytest.raises(UserError, match="mode F have no known range"):
        load_crop(path, 8, 8)


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_is_one_line_or_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 40
    whole = save(Image.new("RGB", (16, 16)), tmp_path / "a.jpg", exif=exif).read_bytes()
    start = whole.index(b"Exif")
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        for place in rng.integers(start, start + 90, 3):
            content[place] = rng.integers(0, 256)
        (tmp_path / "b.jpg").write_bytes(content)
        with contextlib.suppress(UserError):  # refused is as good as read; anything else fails the test
            assert load_crop(tmp_path / "b.jpg", 8, 8).shape == (8, 8, 3)


def test_normalisation_by_hand():
    preprocessing = preprocessing_of(preset("tiny"))
    crops = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = (crops.astype(np.float64) / 255 - preprocessing.mean) / preprocessing.std
    found = preprocessing.normalise(crops)
    assert found.shape == (2, 3, 5, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), atol=2e-6)


def test_batches_keep_the_order(tmp_path):
    paths = [save(Image.new("RGB", (4, 8), (i, i, i)), tmp_path / f"{i}.png") for i in range(11)]
    batches = list(iter_crops(paths, 8, 4, batch_size=4))
    assert [len(b) for b in batches] == [4, 4, 3]
    assert np.concatenate(batches)[:, 0, 0, 0].tolist() == list(range(11))
    assert load_crops(paths[:3], 8, 4).shape == (3, 8, 4, 3)
    assert load_crops([], 8, 4).shape == (0, 8, 4, 3)
