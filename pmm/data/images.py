"""An image file -> upright 8-bit RGB pixels, and what is unusual about the file. Loads no torch.

PIL says what an image is. Plain JPEG files are decoded by libjpeg-turbo itself, several times as fast and with the same
bits; PIL reads all else: other formats and colours, files that state an orientation, whatever is damaged or huge.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pmm.data.left_out import reason_left_out
from pmm.data.preprocessing import Crops
from pmm.data.scan import image_advice
from pmm.utils.errors import InvalidFile
from pmm.utils.files import sha256

EMPTY = "it is empty"
MAX_BYTES = 256 << 20
"""Of a file that is read at all."""
JPEG_START = b"\xff\xd8\xff"
ORIENTATION_MARKS = (b"Exif", b"http://ns.adobe.com/xap/")
"""Begin the only places of a JPEG file where PIL looks for its orientation."""
SUBSAMPLINGS = ("444", "422", "420", "Gray")
MAX_PIXELS = 1 << 24
"""Of a JPEG file that libjpeg-turbo decodes: what is larger is no crop, and PIL has limits for it."""
INSPECTED_TOGETHER = 1024
_MODES = {"L": "grey", "1": "black and white", "CMYK": "CMYK", "P": "palette", "RGBA": "alpha", "LA": "grey with alpha"}


def read_image(path: str | Path) -> Image.Image | Crops:
    """The image at `path`, EXIF-rotated upright and in 8-bit RGB: as its decoder leaves it, PIL's or an array
    [H, W, 3].

    Raises InvalidFile if it cannot be read or decoded.
    """
    try:
        content = _read(path)
        pixels = decode_jpeg(content)
        return to_rgb(_open(content)) if pixels is None else pixels
    except Exception as error:  # decoders and EXIF parsers raise anything on a file made to harm
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        by_name = "" if getattr(error, "errno", None) else reason_left_out(Path(path)).advice  # as convert, or unpack
        raise InvalidFile(f"not a readable image ({reason})", path=path, hint=by_name or image_advice(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB, without alpha. 16-bit grey is scaled, where PIL would clip it to white.

    Raises ValueError for other deep images, whose scale is not known, and whatever a lazy decoder raises.
    """
    image = _upright(image)
    if image.mode.startswith("I;16"):
        deep = np.asarray(image, np.uint16)
        return Image.fromarray(np.rint(deep / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; convert it to 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def decode_jpeg(content: bytes) -> Crops | None:
    """The pixels uint8 RGB [H, W, 3] of a plain JPEG file, or None: then PIL is to read it, or to say what is wrong."""
    if not content.startswith(JPEG_START) or any(mark in content for mark in ORIENTATION_MARKS):
        return None
    try:
        height, width, colours, subsampling = simplejpeg.decode_jpeg_header(content, strict=True)
        if colours not in ("YCbCr", "Gray") or subsampling not in SUBSAMPLINGS or height * width > MAX_PIXELS:
            return None
        pixels: Crops = simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except ValueError:  # what libjpeg-turbo warns of is an error here
        return None
    return pixels


def _read(path: str | Path) -> bytes:
    """At once: PIL would ask for a few bytes at a time, and threads for the interpreter after each."""
    with open(path, "rb", buffering=0) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise ValueError(f"{size / 1e6:,.0f} MB are no crop of a person")
        if content := file.readall():
            return content
    raise ValueError(EMPTY)


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("cannot identify image file") from None  # without the address of the memory it lies in


def _upright(image: Image.Image) -> Image.Image:
    """As `ImageOps.exif_transpose`, which copies what is upright already."""
    image.load()  # first, as it does: a file may state its orientation after its pixels
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


class ImageFacts(NamedTuple):
    """One image file: the reason if it cannot be read, else its size in pixels, oddities and sha256 of its content."""

    fault: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    """What is unusual about its pixels; empty for 8-bit RGB."""
    rotated: bool = False
    digest: bytes = b""


def inspect_image(path: Path) -> ImageFacts:
    """Open `path` with the decoder of training."""
    try:
        read_image(path)
        with Image.open(path) as image:  # the header alone
            mode, (width, height) = image.mode, image.size
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        digest = bytes.fromhex(sha256(path))
    except InvalidFile as error:
        return ImageFacts(fault=_fault(error))
    except OSError as error:  # gone or changed since it was decoded
        return ImageFacts(fault=str(error.strerror or error))
    odd = "" if mode == "RGB" else "16-bit" if mode.startswith("I;16") else _MODES.get(mode, f"mode {mode}")
    return ImageFacts(width=width, height=height, mode=odd, rotated=rotated, digest=digest)


def inspect_images(paths: Sequence[Path], threads: int, progress: Callable[[int], object]) -> list[ImageFacts]:
    """`inspect_image` of each of `paths`, `threads` at a time; `progress` is called with 1 after each."""
    facts: list[ImageFacts] = []
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of huge images and odd EXIF: the report says what matters of it
        for start in range(0, len(paths), INSPECTED_TOGETHER):
            for fact in pool.map(inspect_image, paths[start : start + INSPECTED_TOGETHER]):
                facts.append(fact)
                progress(1)
    return facts


def _fault(error: InvalidFile) -> str:
    cause = error.__cause__
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
