"""The likely mistakes of a client: what a file is fed where its contract is not kept, beside what it should be fed.

Each is a client in numpy: crops of any size in, the array that it would hand to the file out. Those that the bench
measures too are those of `pmm.data.mistakes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import InputContract
from pmm.config import IMAGENET_MEAN, IMAGENET_STD
from pmm.data.crops import load_crops
from pmm.data.mistakes import PreprocessingMistake, likely_mistakes
from pmm.data.preprocessing import Crops, Preprocessing

Fed = npt.NDArray[Any]
"""What a file is fed: [N, H, W, 3] or [N, 3, H, W], of its type."""
Pixels = npt.NDArray[Any]
"""RGB [N, H, W, 3]."""
Scale = Callable[[Pixels, Pixels, Pixels], Pixels]
"""Pixels of 0..255, a mean and a std [3] -> other numbers."""
WITH_BGR = ("resize", "nearest", "area")
"""Resizes that are likely beside colours in the other order."""
BYTES_ONLY = "the file takes whole numbers of 0 to 255, and normalises them itself"


@dataclass(frozen=True, kw_only=True)
class ClientMistake:
    """One mistake, alone."""

    name: str
    description: str
    """What the client did, as `BGR, not RGB`."""
    fix: str
    """What it should do."""
    feed: Callable[[Sequence[Crops]], Fed]
    """Crops of any size -> what the file is fed."""
    resizes: bool = False
    """It shows in crops alone that have not the model's size."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """Clients of a file whose crops are to be as `size` says and to be fed as `input` says."""

    size: Preprocessing
    input: InputContract

    def right(self, crops: Sequence[Crops]) -> Fed:
        """What the file is to be fed."""
        return self.input.feed(load_crops(crops, self.size), self.size)

    def mistakes(self) -> list[ClientMistake]:
        """The mistakes that can be made with this file."""
        known, resizes = list(self._of_bench()), list(self._of_resizes())
        return [*known, *resizes, *self._of_both([*known, *resizes]), *self._of_buffers(), *self._of_numbers()]

    def rounded_otherwise(self, crops: Sequence[Crops]) -> list[Fed]:
        """What the file is fed by clients whose resize rounds otherwise: one grey level less, more, or either, in half
        of the pixels of each crop that is resized."""
        size, random = self.size, np.random.RandomState(0)  # its numbers are the same in every numpy
        feeds = []
        for least, most in ((-1, 0), (0, 1), (-1, 1)):
            other = []
            for crop, pixels in zip(crops, load_crops(crops, size), strict=True):
                step = random.choice([least, most], pixels.shape)
                as_it_is = crop.shape == pixels.shape
                other.append(pixels if as_it_is else (pixels + step).clip(0, 255).astype(np.uint8))
            feeds.append(self.right(other))
        return feeds

    def impossible(self) -> dict[str, str]:
        """Mistakes that cannot be made with this file, and why."""
        why = {name: BYTES_ONLY for name in SCALES if name not in (*BYTES, "raw")} if self._takes_bytes else {}
        if self.size.height == self.size.width:
            why["sides"] = "its crops are square"
        return why

    @property
    def _takes_bytes(self) -> bool:
        return self.input.dtype == "uint8"

    def _of_bench(self) -> Iterator[ClientMistake]:
        for known in likely_mistakes(self.size):
            if known.name == "unnormalised":  # of these numbers `_of_numbers` makes floats
                continue
            asked, given = ("RGB", "BGR") if self.input.colour == "rgb" else ("BGR", "RGB")
            of_opencv = " (OpenCV reads BGR: cvtColor)" if given == "BGR" else ""
            is_bgr = known.name == "bgr"
            yield ClientMistake(
                name=known.name,
                description=f"{given}, not {asked}" if is_bgr else known.description,
                fix=f"give the channels as {asked}{of_opencv}" if is_bgr else self._how_to_resize(),
                feed=partial(self._feed_mistaken, known),
                resizes=not is_bgr,
            )

    def _of_resizes(self) -> Iterator[ClientMistake]:
        for name, words, resize in (
            ("nearest", "the nearest pixel", nearest),
            ("area", "the mean of an area (OpenCV's INTER_AREA)", area),
        ):
            yield ClientMistake(
                name=name,
                description=f"{words}, not {self.size.filter_name}",
                fix=self._how_to_resize(),
                feed=partial(self._feed_resized, resize),
                resizes=True,
            )
        if self.size.padding is None:
            padded = dataclasses.replace(self, size=dataclasses.replace(self.size, padding=(0, 0, 0)))
            yield ClientMistake(
                name="padded",
                description="padded, not stretched",
                fix=self._how_to_resize(),
                feed=padded.right,
                resizes=True,
            )

    def _of_both(self, known: list[ClientMistake]) -> Iterator[ClientMistake]:
        """Another order of colours and another resize, as one who takes OpenCV's defaults."""
        bgr = next(each for each in known if each.name == "bgr")
        for each in known:
            if each.name in WITH_BGR:
                yield ClientMistake(
                    name=f"bgr_{each.name}",
                    description=f"{bgr.description}, and {each.description}",
                    fix=f"{bgr.fix}, and {each.fix}",
                    feed=partial(_feed_turned, each.feed),
                )

    def _of_buffers(self) -> Iterator[ClientMistake]:
        """Right numbers in an order of the memory that is not the file's."""
        layout, other = self.input.layout, "NCHW" if self.input.layout == "NHWC" else "NHWC"
        yield ClientMistake(
            name=other.lower(),
            description=f"{other} in the memory of an {layout} input",
            fix=f"transpose the images to {layout}",
            feed=self._feed_in_other_layout,
        )
        if self.size.height != self.size.width:
            yield ClientMistake(
                name="sides",
                description="height and width swapped",
                fix=f"resize to {self.size.width} wide and {self.size.height} high",
                feed=self._feed_with_swapped_sides,
            )

    def _of_numbers(self) -> Iterator[ClientMistake]:
        """Pixels of another scale than the file takes."""
        scales = BYTES if self._takes_bytes else SCALES
        if not self._takes_bytes and self.input.normalised_by == "graph":
            scales = {name: scales[name] for name in OF_PIXELS}
        for name, (words, numbers) in scales.items():
            fix = self._how_to_normalise()
            yield ClientMistake(name=name, description=words, fix=fix, feed=partial(self._feed_numbers, numbers))

    def _feed_mistaken(self, mistake: PreprocessingMistake, crops: Sequence[Crops]) -> Fed:
        return self.input.feed(mistake.fed(load_crops(crops, mistake.made)), self.size)

    def _feed_resized(self, resize: Callable[[Crops, int, int], Crops], crops: Sequence[Crops]) -> Fed:
        """As `size` says, but that `resize` interpolates."""
        return self.right([resize(crop, *self.size.content_size(*crop.shape[:2])) for crop in crops])

    def _feed_in_other_layout(self, crops: Sequence[Crops]) -> Fed:
        right = self.right(crops)
        turned = right.transpose(0, 3, 1, 2) if self.input.layout == "NHWC" else right.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(turned).reshape(right.shape)

    def _feed_with_swapped_sides(self, crops: Sequence[Crops]) -> Fed:
        turned = dataclasses.replace(self.size, height=self.size.width, width=self.size.height)
        fed = dataclasses.replace(self, size=turned).right(crops)
        return fed.reshape(len(fed), *self.input.shape(self.size))

    def _feed_numbers(self, numbers: Scale, crops: Sequence[Crops]) -> Fed:
        """What `numbers` makes of pixels of 0..255, in the file's order of colours and of axes."""
        mean, std = np.array(self.size.mean, np.float32), np.array(self.size.std, np.float32)
        images = numbers(load_crops(crops, self.size).astype(np.float32), mean, std)
        images = images if self.input.colour == "rgb" else images[..., ::-1]
        images = images if self.input.layout == "NHWC" else images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(images, self.input.dtype)

    def _how_to_resize(self) -> str:
        size = self.size
        padded = "stretched" if size.padding is None else f"padded with {' '.join(map(str, size.padding))}"
        return f"resize as {size.filter_name} does, {padded}"

    def _how_to_normalise(self) -> str:
        if self.input.normalised_by == "graph":
            return "give the pixels as they are, 0 to 255: the file normalises them itself"
        mean, std = (" ".join(f"{value:.6g}" for value in each) for each in (self.size.mean, self.size.std))
        return f"give (pixel / 255 - mean) / std, with the mean {mean} and the std {std} of red, green and blue"


def _feed_turned(feed: Callable[[Sequence[Crops]], Fed], crops: Sequence[Crops]) -> Fed:
    """Of crops whose colours are in the other order."""
    return feed([np.ascontiguousarray(crop[..., ::-1]) for crop in crops])


def _saturated(floats: Pixels) -> Crops:
    """As OpenCV's convertTo does it."""
    return np.rint(floats).clip(0, 255).astype(np.uint8)


def _wrapped(floats: Pixels) -> Crops:
    """As C and numpy do it: cut towards zero, and the lowest 8 bits."""
    return floats.astype(np.int64).astype(np.uint8)


SCALES: dict[str, tuple[str, Scale]] = {
    "unnormalised": ("pixels in 0..1, not normalised", lambda x, mean, std: x / 255),
    "raw": ("pixels in 0..255, neither divided nor normalised", lambda x, mean, std: x),
    "undivided": ("normalised without a division by 255", lambda x, mean, std: (x - mean) / std),
    "normalised": ("normalised by the client", lambda x, mean, std: (x / 255 - mean) / std),
    "divided_twice": ("divided by 255 twice", lambda x, mean, std: (x / 255 / 255 - mean) / std),
    "normalised_twice": ("normalised twice", lambda x, mean, std: ((x / 255 - mean) / std - mean) / std),
    "minus_one_to_one": ("pixel / 127.5 - 1, so pixels in -1..1", lambda x, mean, std: x / 127.5 - 1),
    "by_256": ("divided by 256, not by 255", lambda x, mean, std: (x / 256 - mean) / std),
    "mean_only": ("the mean taken off, not divided by the std", lambda x, mean, std: x / 255 - mean),
    "statistics_bgr": (
        "the mean and the std in the order blue, green, red",
        lambda x, mean, std: (x / 255 - mean[::-1]) / std[::-1],
    ),
    "imagenet": (
        "the mean and the std of ImageNet",
        lambda x, mean, std: (x / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD),
    ),
}
"""What a client can make of pixels RGB of 0..255 where floats are to be normalised, the mean and the std known: in
words, and in numbers."""
OF_PIXELS = ("unnormalised", "undivided", "normalised", "minus_one_to_one", "mean_only")
"""Of these, what can be told apart where the file takes the pixels as they are."""
BYTES: dict[str, tuple[str, Scale]] = {
    "normalised": (
        "normalised floats, rounded to whole numbers of 0 to 255",
        lambda x, mean, std: _saturated((x / 255 - mean) / std),
    ),
    "wrapped": (
        "normalised floats, the lowest 8 bits of their whole part",
        lambda x, mean, std: _wrapped((x / 255 - mean) / std),
    ),
    "unnormalised": ("pixels in 0..1, rounded to 0 and 1", lambda x, mean, std: _saturated(x / 255)),
}
"""The same where bytes are."""


def nearest(pixels: Crops, height: int, width: int) -> Crops:
    """uint8 [h, w, 3] -> [height, width, 3]: of each pixel the one at its upper left corner, as OpenCV's."""
    rows, columns = (np.arange(after) * before // after for before, after in zip(pixels.shape, (height, width)))  # noqa: B905
    return np.ascontiguousarray(pixels[rows][:, columns])


def area(pixels: Crops, height: int, width: int) -> Crops:
    """uint8 [h, w, 3] -> [height, width, 3]: OpenCV's INTER_AREA, each pixel the mean of all that it covers."""
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    rows, columns = (_area_shares(before, after, shrinks) for before, after in zip(pixels.shape, (height, width)))  # noqa: B905
    return np.rint(np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)).clip(0, 255).astype(np.uint8)


def _area_shares(before: int, after: int, shrinks: bool) -> npt.NDArray[np.float64]:
    """[after, before]: the share of each pixel along one side in each of the resized ones."""
    at, scale = np.arange(after)[:, None], before / after
    cells = np.arange(before)[None]
    if shrinks:
        covered = np.minimum((at + 1) * scale, cells + 1) - np.maximum(at * scale, cells)
        return covered.clip(0) / scale
    low = np.floor(at * scale)  # OpenCV enlarges with it as linearly, only from nearer places
    share = np.maximum(0, at + 1 - (low + 1) / scale) % 1
    return (cells == low) * (1 - share) + (cells == np.minimum(low + 1, before - 1)) * share
