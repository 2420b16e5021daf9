import contextlib
import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pmm.data.crops import CHUNK, iter_crops, load_crop, load_crops
from pmm.data.preprocessing import RESIZES, Preprocessing, Resize
from pmm.data.resize_opencv import resize_as_opencv
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue, UserError
from tests.conftest import examples
from tests.refusals import refuses

SIZE = Resize(height=8, width=4)


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


def plainly(path, height, width):
    """The contract, step by step: what `load_crop` must give to the bit."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR))


def noise(mode="RGB", size=(10, 20)):
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    whole = Image.fromarray(pixels, "RGBA")
    return whole if mode == "RGBA" else whole.convert("RGB").convert(mode)


@pytest.mark.parametrize("size", [(16, 8), (20, 10), (7, 30)])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "jpg"), ("RGB", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGB", "webp")],
)
def test_every_mode_equals_the_plain_way(tmp_path, mode, suffix, size):
    path = save(noise(mode), tmp_path / f"a.{suffix}")
    assert np.array_equal(load_crop(path, *size), plainly(path, *size))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colours_keep_their_pixels(tmp_path, mode):
    path = save(noise(mode), tmp_path / "a.png", transparency=(9, 8, 7) if mode == "RGB" else 3)
    assert "transparency" in Image.open(path).info
    assert np.array_equal(load_crop(path, 16, 8), plainly(path, 16, 8))
    assert np.array_equal(load_crop(path, 20, 10), np.asarray(noise(mode).convert("RGB")))


TURNS = {  # what a viewer does with a picture of EXIF orientation n, in numpy
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", [*TURNS, 0, 9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
def test_exif_orientations_are_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = save(noise(), tmp_path / f"a.{suffix}", exif=exif)
    plain = np.asarray(Image.open(save(noise(), tmp_path / f"plain.{suffix}")))
    expected = TURNS.get(orientation, TURNS[1])(plain)
    assert np.array_equal(load_crop(path, *expected.shape[:2]), expected)
    assert np.array_equal(load_crop(path, 16, 8), plainly(path, 16, 8))


def test_an_orientation_after_the_pixels_is_seen(tmp_path):
    """A PNG may hold its EXIF chunk behind the image data."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = save(noise(), tmp_path / "a.png", exif=exif).read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    assert end < last
    (tmp_path / "b.png").write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    assert np.array_equal(load_crop(tmp_path / "b.png", 10, 20), TURNS[6](np.asarray(noise())))


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    whole = save(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), tmp_path / "w.jpg"
    )
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:700])
    with refuses(InvalidFile, "it is empty", path=tmp_path / "empty.jpg"):
        load_crop(tmp_path / "empty.jpg", 8, 4)
    for name in ("empty.jpg", "text.jpg", "cut.jpg", "missing.jpg"):
        hint = "check the path" if name == "missing.jpg" else "replace or remove"
        with refuses(InvalidFile, f"{name}: not a readable image", path=tmp_path / name, hint=hint):
            load_crop(tmp_path / name, 8, 4)


def test_a_file_of_no_image_is_said_without_addresses_and_a_huge_one_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_text("hello")
    with refuses(InvalidFile, "(cannot identify image file)", path=tmp_path / "a.jpg"):
        load_crop(tmp_path / "a.jpg", 8, 4)
    monkeypatch.setattr("pmm.data.images.MAX_BYTES", 4)
    with refuses(InvalidFile, "MB", path=tmp_path / "a.jpg"):
        load_crop(tmp_path / "a.jpg", 8, 4)


def test_16_bit_grey_is_scaled_and_unknown_ranges_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    path = save(Image.fromarray(ramp), tmp_path / "deep.png")
    assert np.abs(load_crop(path, 8, 8)[..., 0].astype(int) - ramp / 257).max() <= 1
    path = save(Image.fromarray(ramp.astype(np.float32)), tmp_path / "float.tiff")
    with refuses(InvalidFile, "mode F", "range", path=path):
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


def test_batches_keep_the_order(tmp_path):
    paths = [save(Image.new("RGB", (4, 8), (i, i, i)), tmp_path / f"{i}.png") for i in range(11)]
    batches = list(iter_crops(paths, SIZE, batch_size=4))
    assert [len(b) for b in batches] == [4, 4, 3]
    assert np.concatenate(batches)[:, 0, 0, 0].tolist() == list(range(11))
    assert load_crops(paths[:3], 8, 4).shape == (3, 8, 4, 3)


@pytest.fixture
def calls(monkeypatch):
    """Names of the files in the order in which `read_image`, which a test shall not wait for, was asked for them."""
    asked = []

    def load(path):
        asked.append(path.name)
        if path.stem.startswith("bad"):
            raise InvalidFile("bad", path=path)
        return np.zeros((8, 4, 3), np.uint8)

    monkeypatch.setattr("pmm.data.crops.read_image", load)
    return asked


def test_the_look_ahead_is_bounded_and_a_reader_that_goes_leaves_no_thread(calls, monkeypatch):
    before, submit, begun = set(threading.enumerate()), ThreadPoolExecutor.submit, []

    def counted(pool, work, crops, paths, *more):
        begun.extend(paths)
        return submit(pool, work, crops, paths, *more)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    batches = iter_crops([Path(str(n)) for n in range(1000)], SIZE, batch_size=10, threads=3)
    assert not calls
    next(batches)
    next(batches)
    assert len(begun) == 40  # the two that were read, and two ahead
    assert len(calls) >= 20
    batches.close()
    assert set(threading.enumerate()) == before
    assert len(begun) == 40


def test_the_first_bad_file_is_named_and_no_thread_is_left(calls):
    before = set(threading.enumerate())
    paths = [Path(str(n)) for n in range(100)]
    paths[33], paths[34] = Path("bad1"), Path("bad2")
    batches = iter_crops(paths, SIZE, batch_size=8, threads=2)
    assert [len(next(batches)) for _ in range(4)] == [8] * 4
    with refuses(InvalidFile, path="bad1"):
        next(batches)
    with refuses(InvalidFile, path="bad1"):
        load_crops(paths, 8, 4)
    assert set(threading.enumerate()) == before


def test_bad_files_are_told_by_number_before_their_batch_where_they_are_passed_over(calls):
    paths = [Path(str(n)) for n in range(40)]
    for number in (0, 17, 18, 39):
        paths[number] = Path(f"bad{number}")
    unreadable, seen = {}, 0
    for batch in iter_crops(paths, SIZE, batch_size=10, threads=2, unreadable=unreadable):
        seen += len(batch)
        assert {number for number in (0, 17, 18, 39) if number < seen} <= set(unreadable)
    assert seen == 40
    assert {number: error.path.name for number, error in unreadable.items()} == {
        number: f"bad{number}" for number in (0, 17, 18, 39)
    }


def test_an_error_drops_the_files_that_wait(monkeypatch):
    """All but the bad file are held up until the pool is told to end: what has not begun by then never does."""
    asked, ending, end = [], threading.Event(), ThreadPoolExecutor.shutdown

    def load(path):
        asked.append(path.name)
        if path.name == "0":
            raise InvalidFile("bad", path=path)
        ending.wait(60)
        return np.zeros((8, 4, 3), np.uint8)

    def shutdown(pool, wait=True, **options):
        end(pool, wait=False, **options)
        ending.set()
        end(pool, wait=wait)

    monkeypatch.setattr("pmm.data.crops.read_image", load)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    with refuses(InvalidFile, path="0"):
        load_crops([Path(str(n)) for n in range(20 * CHUNK)], 8, 4, threads=2)
    assert len(asked) <= 3 * CHUNK


@pytest.mark.parametrize(("threads", "expected"), [(None, 5), (2, 2)])
def test_as_many_threads_as_cores(monkeypatch, threads, expected):
    """Each thread waits for the others: fewer would time out, and more be seen."""
    barrier, names = threading.Barrier(expected, timeout=60), set()

    def load(path):
        if int(path.name) % CHUNK == 0:
            barrier.wait()
        names.add(threading.current_thread().name)
        return np.zeros((8, 4, 3), np.uint8)

    monkeypatch.setattr("pmm.data.crops.read_image", load)
    monkeypatch.setattr("pmm.data.crops.usable_cores", lambda: 5)
    load_crops([Path(str(n)) for n in range(CHUNK * expected * 3)], 8, 4, threads)
    assert len(names) == expected


# --- pixels in memory


def variants(pixels, draw):
    """`pixels` in another memory layout, read-only or not, and as grey in one of its two shapes."""
    if pixels.shape[2] == 1 and draw(st.booleans()):
        pixels = pixels[..., 0]
    layout = draw(st.sampled_from(["as it is", "Fortran", "strided", "reversed"]))
    if layout == "Fortran":
        pixels = np.asfortranarray(pixels)
    elif layout == "strided":
        wide = np.zeros((pixels.shape[0] * 2, pixels.shape[1] + 3, *pixels.shape[2:]), np.uint8)
        wide[::2, 1:-2] = pixels
        pixels = wide[::2, 1:-2]
    elif layout == "reversed":
        pixels = pixels[::-1, ::-1].copy()[::-1, ::-1]
    pixels.flags.writeable = draw(st.booleans()) and pixels.flags.writeable
    return pixels


@st.composite
def crops_in_memory(draw):
    """(An array, its pixels as a mode of PIL): of any size up to a few times that of a crop."""
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    if draw(st.booleans()):  # sizes that are enlarged by whole factors, or left as they are
        height, width = draw(st.sampled_from([8, 16, 32])), draw(st.sampled_from([4, 8, 16]))
    channels = draw(st.sampled_from([1, 3, 4]))
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return variants(pixels, draw), image


@examples(200)
@given(several=st.lists(crops_in_memory(), min_size=1, max_size=10))
def test_arrays_are_resized_to_the_bits_of_their_files(tmp_path_factory, several):
    home = tmp_path_factory.mktemp("files")
    paths = [save(image, home / f"{n}.png") for n, (_, image) in enumerate(several)]
    arrays = [array for array, _ in several]
    before = [array.copy() for array in arrays]
    expected = np.stack([load_crop(path, 32, 16) for path in paths])
    assert np.array_equal(load_crops(arrays, 32, 16), expected)
    assert np.array_equal(load_crops(tuple(arrays), 32, 16, 1), expected)
    mixed = [path if n % 3 == 0 else arrays[n] if n % 3 == 1 else several[n][1] for n, path in enumerate(paths)]
    assert np.array_equal(load_crops(mixed, Preprocessing(height=32, width=16, mean=(0,) * 3, std=(1,) * 3)), expected)
    assert all(np.array_equal(*pair) for pair in zip(arrays, before, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("white", [1, 255])
def test_floats_whose_range_is_stated_are_the_same_pixels(dtype, white):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(load_crops([(levels / 255 * white).astype(dtype), levels], 8, 8, float_range=white)[0],
                          load_crops(levels, 8, 8)[0])  # fmt: skip


def test_one_crop_or_a_batch_of_them_is_no_list(tmp_path):
    path = save(noise(), tmp_path / "a.png")
    pixels = np.asarray(noise())
    expected = load_crop(path, 16, 8)[None]
    for one in (path, str(path), pixels, noise(), [path], [pixels]):
        assert np.array_equal(load_crops(one, 16, 8), expected)
    assert np.array_equal(
        load_crops(np.stack([pixels, pixels[::-1]]), 16, 8), load_crops([pixels, pixels[::-1]], 16, 8)
    )


def test_more_crops_than_a_thread_takes_keep_their_order():
    crops = [np.full((9, 5), n, np.uint8) for n in range(3 * CHUNK + 1)]
    assert load_crops(crops, 8, 4, threads=2)[:, 0, 0, 0].tolist() == list(range(3 * CHUNK + 1))


GOOD = np.zeros((6, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("bad", "facts"),
    [
        (np.zeros((6, 4, 2), np.uint8), ["[6, 4, 2]", "[h, w, 3]"]),
        (np.zeros((3, 6, 5), np.uint8), ["[3, 6, 5]", "transpose(1, 2, 0)"]),
        (np.zeros((2, 6, 4, 3), np.uint8), ["[2, 6, 4, 3]"]),
        (np.zeros((0, 4, 3), np.uint8), ["no pixels", "[0, 4, 3]"]),
        (np.zeros((6, 0), np.uint8), ["no pixels", "[6, 0]"]),
        (np.zeros((6, 4, 3), np.uint16), ["uint16", "expected uint8"]),
        (np.zeros((6, 4, 3), bool), ["bool", "expected uint8"]),
        (np.zeros((6, 4, 3), np.float32), ["float32", "float_range=1"]),
        (None, ["is None", "image could not be read"]),
        ({"a": 1}, ["a dict"]),
        (Image.new("F", (4, 6)), ["mode F"]),
    ],
)
@pytest.mark.parametrize("index", [0, 9])
def test_what_is_no_crop_is_refused_by_its_number(bad, facts, index):
    crops = [GOOD] * index + [bad] + [GOOD, bad] * 5
    with refuses(InvalidInput, f"crop {index} ", *facts, index=index):
        load_crops(crops, 8, 4)


@pytest.mark.parametrize(("value", "white"), [(1.01, 1), (-0.01, 1), (255.5, 255), (np.nan, 255), (np.inf, 1)])
def test_floats_out_of_their_range_are_refused_by_number(value, white):
    crop = np.ones((6, 4, 3), np.float32)
    crop[5, 3, 2] = value
    shown = "NaN" if np.isnan(value) else value
    with refuses(InvalidInput, "crop 1 ", f"0 to {white}", shown, index=1):
        load_crops([np.zeros_like(crop), crop], 8, 4, float_range=white)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_interpolation_rounds_beyond_the_range_is_white_and_black(dtype):
    crop = np.array([[np.nextafter(dtype(1), dtype(2)), -np.nextafter(dtype(0), dtype(1))]], dtype)
    assert load_crops(crop, 1, 2, float_range=1)[0, 0, :, 0].tolist() == [255, 0]
    with refuses(InvalidInput, "0.5 to 1.00001", "0 to 1", index=0):  # every digit that matters
        load_crops(np.array([[0.5, 1.00001]]), 1, 2, float_range=1)


def test_without_a_size_crops_keep_theirs_and_are_copies(tmp_path):
    path = save(noise(), tmp_path / "a.jpg")
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    pixels = np.asarray(noise()).copy()
    crops = load_crops([path, pixels, grey, noise("RGBA")] * 5)
    assert [crop.shape for crop in crops] == [(20, 10, 3), (20, 10, 3), (3, 4, 3), (20, 10, 3)] * 5
    assert all(crop.dtype == np.uint8 and crop.flags.c_contiguous for crop in crops)
    assert np.array_equal(crops[16], load_crop(path, 20, 10))
    assert np.array_equal(crops[17], pixels)
    pixels[:] = 0
    assert crops[17].any()
    with refuses(InvalidInput, "crop 9 ", "[6, 4, 2]", index=9):
        load_crops([GOOD] * 9 + [np.zeros((6, 4, 2), np.uint8)])


def test_a_folder_or_a_file_without_permission_is_not_to_be_removed(tmp_path, monkeypatch):
    with refuses(InvalidFile, "directory", path=tmp_path, hint="pmm embed"):
        load_crops(tmp_path)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pmm.data.images._read", refuse)
    with refuses(InvalidFile, "Permission denied", path=tmp_path / "a.jpg", hint="check its permissions"):
        load_crops(tmp_path / "a.jpg")


def test_nothing_a_missing_file_and_a_size_that_is_none(tmp_path):
    for nothing in ([], (), np.zeros((0, 6, 4, 3), np.uint8)):
        with refuses(InvalidInput, "no crops"):
            load_crops(nothing, 8, 4)
    with refuses(InvalidFile, path="none.jpg"):  # and not one called "n"
        load_crops("none.jpg", 8, 4)
    with refuses(InvalidValue, "float_range", "1 or 255", value=2):
        load_crops(GOOD, 8, 4, float_range=2)
    for threads in (-1, 10**9):
        with refuses(InvalidValue, "threads", value=threads):
            load_crops([GOOD] * 2 * CHUNK, 8, 4, threads)
        with refuses(InvalidValue, "threads", value=threads):
            next(iter_crops([tmp_path], SIZE, 1, threads))
    for size in ((8,), (0, 4), (8, -1), (None, 4), (8.5, 4), ("8", 4)):
        with refuses(InvalidValue, "height, width", "runner.preprocessing"):
            load_crops(GOOD, *size)


# --- other resizes than that of training


def by_pil(pixels, size, height, width):
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    how = filters.get(size.interpolation, Image.Resampling.LANCZOS)
    return np.asarray(Image.fromarray(pixels).resize((width, height), how))


@st.composite
def resizes(draw):
    interpolation, antialias = draw(st.sampled_from(list(RESIZES)))
    padding = draw(st.none() | st.just((114, 7, 250)))
    return Resize(height=32, width=16, interpolation=interpolation, antialias=antialias, padding=padding)


@examples(150)
@given(size=resizes(), height=st.integers(1, 90), width=st.integers(1, 60))
def test_each_resize_is_its_librarys_within_its_padding(size, height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    inner = size.content_size(height, width)
    resize = resize_as_opencv(pixels, *inner) if not size.antialias else by_pil(pixels, size, *inner)
    expected = np.array(resize)
    if size.padding:
        expected = np.full((32, 16, 3), size.padding, np.uint8)
        top, left = (32 - inner[0]) // 2, (16 - inner[1]) // 2  # an odd pixel goes to the bottom or the right
        expected[top : top + inner[0], left : left + inner[1]] = resize
    assert np.array_equal(load_crops(pixels, size)[0], expected)
    assert np.array_equal(load_crops([Image.fromarray(pixels)] * 40, size)[39], expected)


def test_files_grey_and_alpha_are_resized_by_the_same_rule(tmp_path):
    size = Resize(height=32, width=16, antialias=False, padding=(9, 8, 7))
    images = [noise(mode, (11, 21)) for mode in ("RGB", "L", "RGBA")]
    paths = [save(image, tmp_path / f"{n}.png") for n, image in enumerate(images)] * 5
    expected = np.concatenate([load_crops(np.asarray(image.convert("RGB")), size) for image in images] * 5)
    assert np.array_equal(load_crops(paths, size), expected)
    assert np.array_equal(load_crops([np.asarray(image) for image in images], size), expected[:3])
    assert np.array_equal(np.concatenate(list(iter_crops(paths, size, batch_size=4))), expected)
    assert not np.array_equal(expected, load_crops(paths, 32, 16))


def test_a_crop_of_the_right_size_is_kept_by_every_resize():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    for interpolation, antialias in RESIZES:
        for padding in (None, (1, 2, 3)):
            size = Resize(height=32, width=16, interpolation=interpolation, antialias=antialias, padding=padding)
            assert np.array_equal(load_crops(pixels, size)[0], pixels)
