"""Plain JPEG files have the bits of PIL; all that is not plain, or not whole, is left to PIL."""

import io
from unittest import mock

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from pmm.data.crops import load_crop
from pmm.data.images import decode_jpeg, read_image
from pmm.utils.errors import InvalidFile
from tests.conftest import examples
from tests.refusals import refuses


def noise(height=20, width=10, seed=0, *, smooth=False):
    rng = np.random.default_rng(seed)
    if smooth:
        few = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        return few.resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, **options):
    file = io.BytesIO()
    with mock.patch.object(ImageFile, "MAXBLOCK", 2**20):  # PIL's buffer is too small for noise with restart markers
        image.save(file, "JPEG", **options)
    return file.getvalue()


def by_pil(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


@examples(300)
@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    quality=st.sampled_from([1, 30, 75, 95, 100]),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    restart=st.sampled_from([0, 1, 5]),
    smooth=st.booleans(),
    grey=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_plain_files_have_the_bits_of_pil(size, quality, subsampling, progressive, restart, smooth, grey, seed):
    image = noise(*size, seed, smooth=smooth).convert("L" if grey else "RGB")
    kind = {} if grey else {"subsampling": subsampling}
    content = encoded(image, quality=quality, progressive=progressive, restart_marker_blocks=restart, **kind)
    found = decode_jpeg(content)
    assert found is not None
    assert np.array_equal(found, by_pil(content))


WHOLE = [
    encoded(noise(40, 24, smooth=smooth), quality=80, progressive=progressive, restart_marker_blocks=restart)
    for smooth in (False, True)
    for progressive in (False, True)
    for restart in (0, 2)
]
CHANGES = st.tuples(st.sampled_from(["set", "flip", "cut", "insert", "delete"]), st.floats(0, 1), st.integers(0, 255))


def damaged(content, changes):
    content = bytearray(content)
    for change, where, value in changes:
        at = int(where * (len(content) - 1))
        if change == "set":
            content[at] = value
        elif change == "flip":
            content[at] ^= 1 << value % 8
        elif change == "insert":
            content.insert(at, value)
        elif change == "cut":
            del content[max(at, 4) :]
        elif len(content) > 4:
            del content[at]
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
@examples(1500)
@given(content=st.sampled_from(WHOLE), changes=st.lists(CHANGES, min_size=1, max_size=3))
@example(content=WHOLE[0], changes=[])
def test_of_a_damaged_file_no_other_pixels_come_than_from_pil(content, changes):
    """PIL's pixels, or none: then PIL reads the file, or says why it cannot."""
    content = damaged(content, changes)
    found = decode_jpeg(content)
    if found is not None:
        assert np.array_equal(found, by_pil(content))
    elif not changes:
        pytest.fail("a whole file was left to PIL")


def exif(orientation):
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = orientation
    return found


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("options", [{"exif": exif(6)}, {"xmp": XMP}], ids=["EXIF", "XMP"])
def test_a_file_that_states_an_orientation_is_left_to_pil(tmp_path, options):
    content = encoded(noise(), **options)
    assert decode_jpeg(content) is None
    (tmp_path / "a.jpg").write_bytes(content)
    assert np.array_equal(load_crop(tmp_path / "a.jpg", 10, 20), by_pil(content)[::-1].transpose(1, 0, 2))


@pytest.mark.parametrize(
    "content",
    [
        encoded(noise().convert("CMYK")),
        encoded(noise(), keep_rgb=True),
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"hello",
        encoded(noise())[:-30],
    ],
    ids=["CMYK", "RGB", "empty", "two bytes", "three bytes", "text", "cut"],
)
def test_what_is_not_plain_is_left_to_pil(content):
    assert decode_jpeg(content) is None


def test_what_is_huge_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    content = bytearray(encoded(noise()))
    frame = content.index(b"\xff\xc0") + 5
    content[frame : frame + 4] = 2 * (20000).to_bytes(2, "big")
    assert simplejpeg.decode_jpeg_header(bytes(content))[:2] == (20000, 20000)
    assert decode_jpeg(bytes(content)) is None
    (tmp_path / "a.jpg").write_bytes(content)
    with refuses(InvalidFile, "decompression bomb", path=tmp_path / "a.jpg"):
        load_crop(tmp_path / "a.jpg", 8, 4)


def test_crops_come_from_it(tmp_path, monkeypatch):
    """In the sizes of all three ways to go on: as it is, enlarged by whole factors, and any other."""
    content = encoded(noise())
    (tmp_path / "a.jpg").write_bytes(content)
    pixels = Image.fromarray(by_pil(content))
    monkeypatch.setattr(Image, "open", None)
    for height, width in ((20, 10), (60, 20), (9, 7)):
        expected = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR))
        assert np.array_equal(load_crop(tmp_path / "a.jpg", height, width), expected)


@pytest.mark.parametrize(
    ("name", "advice"), [("a.heic", "convert"), ("a.zip", "unpack"), ("a.mp4", "embed"), ("a.jpg", "replace")]
)
def test_what_is_no_image_says_what_to_do_by_its_name(tmp_path, name, advice):
    with refuses(InvalidFile, path=tmp_path / name, hint="check the path"):
        read_image(tmp_path / name)
    (tmp_path / name).write_bytes(b"no image")
    with refuses(InvalidFile, path=tmp_path / name, hint=advice):
        read_image(tmp_path / name)
