"""An image file -> the uint8 crop that a deployed graph takes.

Everything that evaluates, exports, verifies or serves goes through here, so that no two paths resize differently.
PIL says what a crop is. What is faster with the same bits does most of it: `pmm.data.jpeg`, and where torch is loaded
`pmm.data.resize_torch`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pmm.data import jpeg, resize_torch
from pmm.data.preprocessing import Crops
from pmm.utils.errors import UserError
from pmm.utils.hardware import usable_cores

MOST_BYTES = 256 << 20
"""Of a file that is read at all."""
AHEAD = 2
"""Batches that are loaded while the reader has one."""
CHUNK = 8
"""Images that a thread loads in a row: handing over each one alone would take a tenth of its time."""


def load_crop(path: str | Path, height: int, width: int) -> Crops:
    """The image at `path` as uint8 RGB [height, width, 3]: EXIF-rotated upright, converted to RGB, resized bilinearly.

    Raises UserError naming the file if it cannot be read or decoded.
    """
    try:
        content = _read(path)
        if (pixels := jpeg.decoded(content)) is not None:
            return _resized(pixels, height, width)
        with _opened(content) as image:
            return _resized(_to_rgb(_upright(image)), height, width)
    except Exception as error:  # decoders and EXIF parsers raise anything on a file made to harm
        reason = str(error).replace(str(path), "file") or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); replace or remove it") from error


def _read(path: str | Path) -> bytes:
    """At once: PIL would ask for a few bytes at a time, and threads for the interpreter after each."""
    with open(path, "rb", buffering=0) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
            raise ValueError(f"{size / 1e6:,.0f} MB are no crop of a person")
        return file.readall()


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("cannot identify image file") from None  # without the address of the memory it lies in


def _upright(image: Image.Image) -> Image.Image:
    """As `ImageOps.exif_transpose`, which copies what is upright already."""
    image.load()  # first, as it does: a file may state its orientation after its pixels
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. 16-bit grey is scaled, where PIL would clip it to white; other deep images have no known scale."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image, np.uint16)
        return Image.fromarray(np.rint(deep / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; convert it to 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _resized(image: Image.Image | Crops, height: int, width: int) -> Crops:
    size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if size == (width, height):
        return np.asarray(image)
    if resize_torch.enlarges(size, (width, height)):
        return resize_torch.enlarged(np.array(image), height, width)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def iter_crops(
    paths: Sequence[str | Path], height: int, width: int, batch_size: int, threads: int | None = None
) -> Iterator[Crops]:
    """Batches uint8 [B, height, width, 3] in the order of `paths`, decoded up to two batches ahead by `threads` threads
    (default: one for each core this process may use).

    Raises UserError naming the first file that cannot be read, in place of its batch. Whichever way it ends, closed
    early too, its threads have ended before.
    """
    ahead: deque[tuple[Crops, list[Future[None]]]] = deque()
    with _threads(threads) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            crops = np.empty((len(batch), height, width, 3), np.uint8)
            ahead.append((crops, _submit(pool, batch, crops)))
            if len(ahead) > AHEAD:
                yield _loaded(*ahead.popleft())
        while ahead:
            yield _loaded(*ahead.popleft())


def load_crops(paths: Sequence[str | Path], height: int, width: int, threads: int | None = None) -> Crops:
    """All of `paths` as one array uint8 RGB [N, height, width, 3]; `threads` and errors as in `iter_crops`.

    Example:
        >>> crops = pmm.load_crops(["query.jpg", "query.jpg"], 128, 64)
        >>> crops.shape, crops.dtype.name
        ((2, 128, 64, 3), 'uint8')
    """
    crops = np.empty((len(paths), height, width, 3), np.uint8)
    with _threads(threads) as pool:
        return _loaded(crops, _submit(pool, paths, crops))


@contextmanager
def _threads(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool whose waiting work is dropped at the end, for an error or a reader that has gone."""
    pool = ThreadPoolExecutor(threads or usable_cores())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, paths: Sequence[str | Path], crops: Crops) -> list[Future[None]]:
    """Let `pool` load `paths` into `crops`."""
    starts = range(0, len(paths), CHUNK)
    return [pool.submit(_load_into, crops[k : k + CHUNK], paths[k : k + CHUNK]) for k in starts]


def _load_into(crops: Crops, paths: Sequence[str | Path]) -> None:
    for place, path in enumerate(paths):
        crops[place] = load_crop(path, *crops.shape[1:3])


def _loaded(crops: Crops, parts: list[Future[None]]) -> Crops:
    for part in parts:
        part.result()
    return crops
