"""Image files and arrays -> the uint8 crops that a deployed graph takes.

Everything that evaluates, exports, verifies or serves goes through here, so that no two paths resize differently.
`pmm.data.preprocessing.Resize` states how. PIL does it, or `pmm.data.resize_opencv` where it is to be OpenCV's;
`pmm.data.resize_torch` does some of PIL's faster, with the same bits, where torch is loaded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from pmm.data import resize_torch
from pmm.data.images import read_image, to_rgb
from pmm.data.preprocessing import Crops, Resize
from pmm.data.resize_opencv import resize_as_opencv
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue, reason_of
from pmm.utils.hardware import check_threads, usable_cores

CropSource: TypeAlias = str | Path | Image.Image | npt.NDArray[Any]
"""A file, or pixels in memory."""
FloatRange: TypeAlias = Literal[1, 255]
LOOK_AHEAD = 2
"""Batches that are loaded while the reader has one."""
CHUNK = 8
"""Crops that a thread loads in a row: handing over each one alone would take a tenth of its time."""
PIL_FILTERS: dict[str, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ROUNDING = 1e-6
"""By which interpolated floats may be beyond white or below black, as a share of white."""


@overload
def load_crops(
    crops: CropSource | Sequence[CropSource],
    *,
    threads: int | None = None,
    float_range: FloatRange | None = None,
) -> list[Crops]: ...


@overload
def load_crops(
    crops: CropSource | Sequence[CropSource],
    height: Resize,
    *,
    threads: int | None = None,
    float_range: FloatRange | None = None,
) -> Crops: ...


@overload
def load_crops(
    crops: CropSource | Sequence[CropSource],
    height: int,
    width: int,
    threads: int | None = None,
    *,
    float_range: FloatRange | None = None,
) -> Crops: ...


def load_crops(
    crops: CropSource | Sequence[CropSource],
    height: int | Resize | None = None,
    width: int | None = None,
    threads: int | None = None,
    *,
    float_range: FloatRange | None = None,
) -> Crops | list[Crops]:
    """Crops as a list of uint8 RGB [h, w, 3], each of its own size, which a runner takes; or with a size as one array
    uint8 RGB [N, height, width, 3], resized as `runner.preprocessing` says, or as for training.

    Args:
        crops: a path, an array or a PIL image, or a list of them in any mix. Arrays are RGB: uint8 [h, w, 3], grey
            [h, w] or [h, w, 1], or RGBA [h, w, 4], whose alpha is dropped, as in files. They may have any strides, and
            be read-only. An array [N, h, w, C] is N crops. Colours of OpenCV are swapped by `pmm.crop_boxes`.
        height: pixels, to which crops are stretched by PIL's bilinear resize; or `runner.preprocessing`, without a
            `width`; None: crops keep their sizes.
        width: pixels, beside a height in pixels.
        threads: that read and resize (default: one for each core this process may use).
        float_range: what white is in float arrays, 1 or 255. There is no default: a guess would be wrong in silence.

    Raises:
        InvalidFile: the first file that cannot be read.
        InvalidInput: no crops; or the first array of another shape or type, without pixels, of floats without
            `float_range`, or with values beyond it (its `index`), but for the rounding of interpolation.
        InvalidValue: a size, a number of threads or a range that cannot be.

    Examples:
        >>> [crop.ndim for crop in pmm.load_crops("query.jpg")]  # of the size of the file: a runner resizes it
        [3]
        >>> crops = pmm.load_crops(["query.jpg", np.zeros((90, 40, 3), np.uint8)], 128, 64)
        >>> crops.shape, crops.dtype.name
        ((2, 128, 64, 3), 'uint8')
    """
    size = None if height is None and width is None else _resize_to(height, width)
    if float_range not in (None, 1, 255):
        raise InvalidValue("float_range", float_range, "1 or 255")
    sources = _as_list(crops)
    if not sources:
        raise InvalidInput("there are no crops", expected="1 or more", hint="skip frames without people")
    if threads is not None:
        check_threads(threads)
    if size is None:
        return _at_own_sizes(sources, threads, float_range)
    loaded = np.empty((len(sources), size.height, size.width, 3), np.uint8)
    if _are_few(sources):
        _load_into(loaded, sources, size, 0, float_range)
        return loaded
    with _thread_pool(threads) as pool:
        return _complete(loaded, _submit(pool, sources, loaded, size, float_range))


def iter_crops(
    paths: Sequence[str | Path],
    size: Resize,
    batch_size: int,
    threads: int | None = None,
    *,
    unreadable: dict[int, InvalidFile] | None = None,
) -> Iterator[Crops]:
    """Batches uint8 [B, height, width, 3] in the order of `paths`, resized as `size` says, decoded up to two batches
    ahead by `threads` threads (default: one for each core this process may use).

    Raises InvalidFile for the first file that cannot be read, in place of its batch; or, with `unreadable`, puts the
    error there by the number of the path before its batch comes, where that crop is black. Whichever way it ends,
    closed early too, its threads have ended before.
    """
    if threads is not None:
        check_threads(threads)
    ahead: deque[tuple[Crops, list[Future[None]]]] = deque()
    with _thread_pool(threads) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            crops = np.empty((len(batch), size.height, size.width, 3), np.uint8)
            ahead.append((crops, _submit(pool, batch, crops, size, first=start, unreadable=unreadable)))
            if len(ahead) > LOOK_AHEAD:
                yield _complete(*ahead.popleft())
        while ahead:
            yield _complete(*ahead.popleft())


def load_crop(path: str | Path, height: int, width: int) -> Crops:
    """The image at `path` as training takes it, uint8 RGB [height, width, 3]: upright, converted to RGB, stretched by
    PIL's bilinear resize.

    Raises InvalidFile if it cannot be read or decoded.
    """
    return _resized(read_image(path), Resize(height=height, width=width))


def check_pixels(
    pixels: object, name: str, *, index: int | None = None, float_range: FloatRange | None = None
) -> Crops:
    """`pixels` as uint8 [h, w, C] with 1, 3 or 4 channels; a view of them unless they are floats.

    Raises InvalidInput, with `index`, for what is no such array and for values beyond `float_range`.
    """
    if pixels is None:
        raise InvalidInput(f"{name} is None", index=index, hint="the video ended, or the image could not be read")
    if isinstance(pixels, Image.Image):  # numpy would take the numbers of a palette for grey
        hint = "np.asarray(image.convert('RGB')) is RGB"
        raise InvalidInput(f"{name} is an image of PIL", index=index, expected="an array", hint=hint)
    try:
        array = np.asarray(pixels)
    except Exception as error:  # arrays on a GPU refuse in their own ways
        raise InvalidInput(f"{name} is no array of numpy ({reason_of(error)})", index=index) from error
    shape = list(array.shape)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        facts = f"a {type(pixels).__name__}" if array.dtype == object else f"{array.dtype} {shape}"
        channels_first = len(shape) == 3 and shape[0] in (1, 3, 4)
        hint = "put the channels last, as by transpose(1, 2, 0)" if channels_first else ""
        expected = "uint8 [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]"
        raise InvalidInput(f"{name} is {facts}", index=index, expected=expected, hint=hint)
    if not array.size:
        raise InvalidInput(f"{name} has no pixels: it is {shape}", index=index)
    if array.dtype.kind == "f" and float_range:
        low, high = float(array.min()), float(array.max())
        rounding = float_range * max(ROUNDING, float(np.finfo(array.dtype).eps))  # far less than a level of uint8
        if not (low >= -rounding and high <= float_range + rounding):  # NaN is neither
            worst = "NaN" if np.isnan(low) else f"values of {array.min()!s} to {array.max()!s}"
            raise InvalidInput(f"{name} holds {worst}", index=index, expected=f"0 to {float_range}")
        return np.rint(array * np.float32(255 / float_range)).astype(np.uint8)
    if array.dtype != np.uint8:
        floats = array.dtype.kind == "f" and index is not None
        hint = "say what white is: pmm.load_crops(..., float_range=1), or 255" if floats else ""
        raise InvalidInput(f"{name} is {array.dtype}", index=index, expected="uint8", hint=hint)
    return array


def _as_list(crops: CropSource | Sequence[CropSource]) -> Sequence[CropSource]:
    if isinstance(crops, str | os.PathLike | Image.Image):
        return [crops]
    if isinstance(crops, Sequence):
        return crops
    return list(crops) if np.ndim(crops) == 4 else [crops]


def _resize_to(height: int | Resize | None, width: int | None) -> Resize:
    if isinstance(height, Resize) and width is None:
        return height
    if not all(isinstance(side, int | np.integer) and side >= 1 for side in (height, width)):
        expected = "whole numbers of pixels, or runner.preprocessing alone"
        raise InvalidValue("height, width", f"{height}, {width}", expected)
    return Resize(height=int(height), width=int(width))  # type: ignore[arg-type]


def _are_few(sources: Sequence[CropSource]) -> bool:
    """Whether one thread is the fastest: pixels in memory are resized before another one has had its turn."""
    from_files = any(isinstance(source, str | os.PathLike) for source in sources)
    return len(sources) <= (CHUNK if from_files else 2 * CHUNK)


def _at_own_sizes(sources: Sequence[CropSource], threads: int | None, float_range: FloatRange | None) -> list[Crops]:
    """Copies: no crop changes with the memory that it was made from."""

    def load(index: int) -> Crops:
        return np.array(_pixels(sources[index], index, float_range))

    if _are_few(sources):
        return [load(index) for index in range(len(sources))]
    with _thread_pool(threads) as pool:
        return list(pool.map(load, range(len(sources)), chunksize=CHUNK))


def _load_into(
    loaded: Crops,
    sources: Sequence[CropSource],
    size: Resize,
    first: int,
    float_range: FloatRange | None,
    unreadable: dict[int, InvalidFile] | None = None,
) -> None:
    """Fill `loaded` from `sources`; `first` is the number of the first of them, for messages and for `unreadable`."""
    for place, source in enumerate(sources):
        try:
            loaded[place] = _resized(_pixels(source, first + place, float_range), size)
        except InvalidFile as error:
            if unreadable is None:
                raise
            unreadable[first + place] = error
            loaded[place] = 0


def _pixels(source: CropSource, index: int, float_range: FloatRange | None) -> Image.Image | Crops:
    """Upright 8-bit RGB, from memory as `read_image` leaves that of a file. Raises InvalidFile, or InvalidInput with
    the number of the crop."""
    if isinstance(source, str | os.PathLike):
        return read_image(source)
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except Exception as error:  # a decoder that has waited until now
            raise InvalidInput(f"crop {index} is not a readable image ({reason_of(error)})", index=index) from error
    pixels = check_pixels(source, f"crop {index}", index=index, float_range=float_range)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels[..., :3])


def _resized(image: Image.Image | Crops, size: Resize) -> Crops:
    before = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
    height, width = after = size.content_size(*before)
    content = np.asarray(image) if before == after else _interpolated(image, before, after, size)
    if size.padding is None:
        return content
    padded = np.empty((size.height, size.width, 3), np.uint8)
    padded[:] = size.padding
    top, left = (size.height - height) // 2, (size.width - width) // 2
    padded[top : top + height, left : left + width] = content
    return padded


def _interpolated(image: Image.Image | Crops, before: tuple[int, int], after: tuple[int, int], how: Resize) -> Crops:
    if not how.antialias:
        return resize_as_opencv(np.asarray(image), *after)
    if how.interpolation == "bilinear" and resize_torch.can_enlarge(before, after):
        return resize_torch.enlarge(np.array(image), *after)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(image.resize(after[::-1], PIL_FILTERS[how.interpolation]))


@contextmanager
def _thread_pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool whose waiting work is dropped at the end, for an error or a reader that has gone."""
    pool = ThreadPoolExecutor(threads or usable_cores())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor,
    sources: Sequence[CropSource],
    loaded: Crops,
    size: Resize,
    float_range: FloatRange | None = None,
    *,
    first: int = 0,
    unreadable: dict[int, InvalidFile] | None = None,
) -> list[Future[None]]:
    """Let `pool` fill `loaded` from `sources`, of which `first` is the number of the first."""

    def load(k: int) -> Future[None]:
        part = (loaded[k : k + CHUNK], sources[k : k + CHUNK], size, first + k, float_range, unreadable)
        return pool.submit(_load_into, *part)

    return [load(k) for k in range(0, len(sources), CHUNK)]


def _complete(loaded: Crops, parts: list[Future[None]]) -> Crops:
    for part in parts:
        part.result()
    return loaded
