"""The loader of training batches.

Every random choice comes from a generator seeded by (seed, epoch) or (seed, epoch, batch), so that the batches of an
epoch do not depend on the number of workers nor on the epochs before it: a resumed run sees what the uninterrupted one
would have. What happens to a crop depends on its position alone, whoever loads it and with whichever others.

Workers send uint8 crops, a quarter of what the network takes; `pmm.data.batches.normalize_batch` does the rest on the
training device.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pmm.config import Config
from pmm.data.augmentation import Augmentation, draw_augmentation, shift_into
from pmm.data.batches import TrainBatch
from pmm.data.crops import load_crop
from pmm.data.preprocessing import Crops
from pmm.data.sampler import PKSampler
from pmm.data.samples import Sample, class_indices
from pmm.utils.errors import UserError

AUGMENT = 3  # a stream of the run's seed, see pmm.data.sampler
PREFETCH = 2  # batches that each worker is ahead
LOST_WORKER = "DataLoader worker"  # begins what torch raises, wherever the process is, when a worker is gone
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class _Found(NamedTuple):
    """A batch as a worker sends it: in numpy, as each tensor would be sent as an open file."""

    crops: Crops | int
    """The crops, or the number of the slot that holds them."""
    mirrored: npt.NDArray[np.bool_]
    cutouts: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    camids: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    skipped: dict[int, str]
    """Of the samples that could not be read: index and why."""


class TrainSet(Dataset[Any]):
    """Augmented batches by a list of (sample index, epoch, position); a bad file comes as its error, not raised.

    `slots` uint8 [S, B, H, W, 3], if any, is shared memory: batch n of an epoch is written to slot n modulo S. With
    `skip_bad` the next readable image of the identity takes the place of one that is not.
    """

    def __init__(
        self, samples: tuple[Sample, ...], config: Config, slots: Tensor | None = None, *, skip_bad: bool = False
    ) -> None:
        self.samples, self.config, self.slots, self.skip_bad = samples, config, slots, skip_bad
        labels = class_indices(samples)
        self.labels = [labels[sample.pid] for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, keys: list[tuple[int, int, int]]) -> _Found | UserError:
        height, width = self.config.data.height, self.config.data.width
        how = self._draw(keys)
        slot = 0
        if self.slots is None:
            crops = np.empty((len(keys), height, width, 3), np.uint8)
        else:
            slot = keys[0][2] // self.config.recipe.batch_size % len(self.slots)
            crops = self.slots[slot].numpy()
        skipped: dict[int, str] = {}
        indices = []
        shifts = zip(how.down.tolist(), np.where(how.mirrored, -how.right, how.right).tolist(), strict=True)
        for out, (asked, _, _), (down, right) in zip(crops, keys, shifts, strict=True):
            try:
                index, crop = self._readable(asked, height, width, skipped)
            except UserError as error:
                return error  # a worker's exception would reach the user with the worker's traceback around it
            indices.append(index)
            shift_into(out, crop, down, right)
        return _Found(
            crops if self.slots is None else slot,
            how.mirrored,
            how.cutouts,
            np.array([self.labels[index] for index in indices]),
            np.array([self.samples[index].camid for index in indices]),
            np.array(indices),
            skipped,
        )

    def _readable(self, asked: int, height: int, width: int, skipped: dict[int, str]) -> tuple[int, Crops]:
        """The sample `asked` for, or with `skip_bad` the next of its identity that can be read."""
        index = asked
        while True:
            try:
                return index, load_crop(self.samples[index].path, height, width)
            except UserError as error:
                if not self.skip_bad:
                    raise
                skipped[index] = str(error)
            same = [other for other, label in enumerate(self.labels) if label == self.labels[asked]]
            index = same[(same.index(index) + 1) % len(same)]
            if index == asked:
                raise UserError(f"no image of identity {self.samples[asked].pid} can be read: {skipped[asked]}")

    def _draw(self, keys: list[tuple[int, int, int]]) -> Augmentation:
        """Of `keys`, a part of one batch of the epoch, from what is drawn for all of it."""
        data, size = self.config.data, self.config.recipe.batch_size
        _, epoch, first = keys[0]
        rng = np.random.default_rng([self.config.seed, AUGMENT, epoch, first // size])
        how = draw_augmentation(self.config.recipe, data.height, data.width, size, rng)
        own = [position % size for _, _, position in keys]
        return Augmentation(how.mirrored[own], how.down[own], how.right[own], how.cutouts[own])


class TrainLoader:
    """The batches of an epoch, `TrainBatch`es or UserErrors in their place.

    The crops of one are valid until the next is asked for.

    Workers write crops to shared memory that is used again and again: the kernel takes longer to hand out new pages
    than it takes to fill them, so that a batch sent as a new shared tensor costs a quarter of its decoding on top.
    """

    def __init__(
        self, samples: tuple[Sample, ...], config: Config, *, rank: int = 0, world: int = 1, skip_bad: bool = False
    ) -> None:
        workers, recipe = config.data.workers, config.recipe
        recipe.ids_per_part(world)
        shape = (recipe.batch_size // world, config.data.height, config.data.width, 3)
        self.slots = _shared(PREFETCH * workers + 1, shape) if workers else None
        self.ending = torch.zeros((), dtype=torch.bool).share_memory_()
        """That this process is about to end, and its workers with it."""
        if workers:
            atexit.register(self.ending.fill_, True)  # before multiprocessing ends the workers: the last comes first
        train_set = TrainSet(samples, config, self.slots, skip_bad=skip_bad)
        self.sampler = PKSampler(train_set.labels, recipe.ids_per_batch, recipe.images_per_id, config.seed, rank, world)
        self.skipped: dict[int, str] = {}
        """Of the samples that could not be read so far: index and why."""
        self.loader: DataLoader[Any] = DataLoader(
            train_set,
            sampler=self.sampler,
            batch_size=None,  # an item of the set is a batch
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=partial(_start_worker, self.ending),
            persistent_workers=workers > 0,
            # its own: else each start of the workers would move the global generator, and a resumed run with it
            generator=torch.Generator().manual_seed(config.seed),
        )
        self.pinned = torch.cuda.is_available()

    def __len__(self) -> int:
        return len(self.sampler)

    def close(self) -> None:
        """End the workers; a new epoch starts new ones.

        Where an error's traceback holds a loader, Python finds it late and ends its queues before torch tells the
        workers through them: 10 s go by for each.
        """
        if (iterator := getattr(self.loader, "_iterator", None)) is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None

    def __iter__(self) -> Iterator[TrainBatch | UserError]:
        for batch in self.loader:
            if isinstance(batch, _Found):
                self.skipped |= batch.skipped
                yield self._batch(batch)
            else:
                yield batch

    def _batch(self, found: _Found) -> TrainBatch:
        """Its crops are the slot itself, or pinned memory of their own: a GPU may still be copying when the next batch
        is asked for. Until then no worker writes to the slot: asking for a batch lets the workers begin the one
        PREFETCH * workers later, and there is one slot more than that.
        """
        if isinstance(found.crops, int):
            assert self.slots is not None
            crops = self.slots[found.crops]
            if self.pinned:
                slot, crops = crops, torch.empty(crops.shape, dtype=crops.dtype, pin_memory=True)
                crops.numpy()[:] = slot.numpy()  # torch's threads would spin on the cores that the workers need
        else:
            crops = self._own(found.crops)
        return TrainBatch(crops, *map(self._own, found[1:6]))

    def _own(self, values: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.pinned else tensor


def train_batches(
    samples: tuple[Sample, ...], config: Config, *, rank: int = 0, world: int = 1, skip_bad: bool = False
) -> tuple[TrainLoader, PKSampler]:
    """The loader of `TrainBatch`es (or UserErrors in their place) and its sampler, whose `epoch` the caller sets.

    Process `rank` of `world` gets its share of each batch. Raises UserError if there are fewer identities than a batch
    needs, a batch that so many processes cannot share, or too little shared memory for the workers.
    """
    loader = TrainLoader(samples, config, rank=rank, world=world, skip_bad=skip_bad)
    return loader, loader.sampler


def _shared(slots: int, shape: tuple[int, ...]) -> Tensor:
    """Shared memory uint8 [slots, *shape]."""
    try:
        return torch.empty((slots, *shape), dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        megabytes = slots * math.prod(shape) / 1e6
        raise UserError(
            f"the loading workers share {megabytes:.0f} MB, which are not to be had ({str(error).splitlines()[0]}); "
            "use fewer --workers (0: none), or with Docker a larger --shm-size"
        ) from error


def _as_it_is(found: Any) -> Any:
    return found


def _start_worker(ending: Tensor, worker: int) -> None:
    # a terminal sends Ctrl-C to every process: a worker that stopped by itself would look like one that died
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # likewise where all processes of a job are told to end: the run is saved first
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending else None)
    _keep_memory()


def _keep_memory() -> None:
    """Let glibc keep what an image took for the next one, not return it to the kernel: its pages cost faults again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most there is
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
