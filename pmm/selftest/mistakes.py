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
from pmm.data.crops import load_crops
from pmm.data.mistakes import PreprocessingMistake, likely_mistakes
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.selftest.resizes import area, nearest
from pmm.selftest.scales import BYTES, OF_PIXELS, SCALES, Scale, without_caffe_mean

Fed = npt.NDArray[Any]
"""What a file is fed: [N, H, W, 3] or [N, 3, H, W], of its type."""
WITH_BGR = ("resize", "nearest", "area")
"""Resizes that are likely beside colours in the other order."""
ORDERS = ("rbg", "grb", "gbr", "brg")
"""Of channels, beside RGB and BGR."""
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
    flip_tta: bool = False
    """Whether the file averages with the mirror image."""

    def right(self, crops: Sequence[Crops]) -> Fed:
        """What the file is to be fed."""
        return self.input.feed(load_crops(crops, self.size), self.size)

    def mistakes(self) -> list[ClientMistake]:
        """The mistakes that can be made with this file."""
        known, resizes = list(self._of_bench()), list(self._of_resizes())
        both = [*self._of_both([*known, *resizes]), *self._of_turns()]
        return [*known, *resizes, *both, *self._of_buffers(), *self._of_numbers()]

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
        floats = ("bgr_caffe", *(name for name in SCALES if name not in (*BYTES, "raw")))
        why = dict.fromkeys(floats, BYTES_ONLY) if self._takes_bytes else {}
        if self.size.height == self.size.width:
            why["sides"] = "its crops are square"
        if self.flip_tta:
            why["mirrored"] = "the file averages with the mirror image"
        return why

    @property
    def _takes_bytes(self) -> bool:
        return self.input.dtype == "uint8"

    @property
    def _asked(self) -> str:
        """The order of the file's channels."""
        return self.input.colour.upper()

    def _of_bench(self) -> Iterator[ClientMistake]:
        for known in likely_mistakes(self.size):
            if known.name == "unnormalised":  # of these numbers `_of_numbers` makes floats
                continue
            asked, given = self._asked, "BGR" if self.input.colour == "rgb" else "RGB"
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

    def _of_turns(self) -> Iterator[ClientMistake]:
        """Channels in any other order, and crops that are mirrored."""
        for order in ORDERS:
            yield ClientMistake(
                name=order,
                description=f"{order.upper()}, not {self._asked}",
                fix=f"give the channels as {self._asked}",
                feed=partial(self._feed_in_order, order),
            )
        if not self.flip_tta:
            yield ClientMistake(
                name="mirrored",
                description="mirrored: left is right",
                fix="give the crops as they are, without a flip",
                feed=self._feed_mirrored,
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
        if "caffe" in scales:  # whose own networks take BGR, most files RGB
            other = "BGR" if self.input.colour == "rgb" else "RGB"
            yield ClientMistake(
                name="bgr_caffe",
                description=f"{other}, not {self._asked}, and {scales['caffe'][0]}",
                fix=f"give the channels as {self._asked}, and {self._how_to_normalise()}",
                feed=self._feed_of_caffe,
            )

    def _feed_mistaken(self, mistake: PreprocessingMistake, crops: Sequence[Crops]) -> Fed:
        return self.input.feed(mistake.fed(load_crops(crops, mistake.made)), self.size)

    def _feed_resized(self, resize: Callable[[Crops, int, int], Crops], crops: Sequence[Crops]) -> Fed:
        """As `size` says, but that `resize` interpolates."""
        return self.right([resize(crop, *self.size.content_size(*crop.shape[:2])) for crop in crops])

    def _feed_in_order(self, order: str, crops: Sequence[Crops]) -> Fed:
        places = ["rgb".index(colour) for colour in order]
        places = places if self.input.colour == "rgb" else places[::-1]
        return self.input.feed(np.ascontiguousarray(load_crops(crops, self.size)[..., places]), self.size)

    def _feed_mirrored(self, crops: Sequence[Crops]) -> Fed:
        return self.right([np.ascontiguousarray(crop[:, ::-1]) for crop in crops])

    def _feed_of_caffe(self, crops: Sequence[Crops]) -> Fed:
        fed = self._feed_numbers(without_caffe_mean, crops)
        return np.ascontiguousarray(np.flip(fed, 3 if self.input.layout == "NHWC" else 1))

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
