"""The loader of training batches.

Every random choice comes from a generator seeded by (seed, epoch) or (seed, epoch, batch), so that the batches of an
epoch depend neither on the number of workers nor on earlier epochs, and a resumed run sees those of an uninterrupted
one. The augmentation of a crop depends on its position alone, not on the worker or process that loads it.

Workers send uint8 crops, a quarter of what the network takes; `pmm.data.batches.normalize_batch` does the rest on the
training device.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing import forkserver
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
from pmm.data.occlusion import Occluder
from pmm.data.preprocessing import Crops
from pmm.data.sampler import EpochSampler, sampler_of
from pmm.data.samples import Sample, class_indices
from pmm.utils.errors import InvalidFile, OutOfMemory, UserError, reason_of

CPU = torch.device("cpu")
AUGMENT = 3  # a stream of the run's seed, see pmm.data.sampler
PREFETCH = 2  # batches that each worker is ahead
LOST_WORKER = "DataLoader worker"  # start of torch's error, raised anywhere in the process, for a worker that died
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class _WorkerBatch(NamedTuple):
    """A batch as a worker sends it: in numpy, because each tensor would be sent as an open file."""

    crops: Crops | int
    """The crops, or the number of the slot that holds them."""
    mirrored: npt.NDArray[np.bool_]
    cutouts: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    skipped: dict[int, str]
    """The samples that could not be read, index to reason."""


class TrainSet(Dataset[Any]):
    """Augmented batches by a list of (sample index, epoch, position); the error of a bad file is returned, not raised.

    `slots` uint8 [S, B, H, W, 3], if any, is shared memory: batch n of the run is written to slot n modulo S. With
    `skip_bad` the next readable image of the identity replaces an unreadable one. An `occluder` hides parts of crops.
    """

    def __init__(
        self,
        samples: tuple[Sample, ...],
        config: Config,
        slots: Tensor | None = None,
        *,
        skip_bad: bool = False,
        occluder: Occluder | None = None,
    ) -> None:
        self.samples, self.config, self.slots, self.skip_bad = samples, config, slots, skip_bad
        self.occluder = occluder
        labels = class_indices(samples)
        self.labels = [labels[sample.pid] for sample in samples]
        self.batches_per_epoch = len(sampler_of(self.labels, config.recipe, config.seed))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, keys: list[tuple[int, int, int]]) -> _WorkerBatch | UserError:
        height, width = self.config.data.height, self.config.data.width
        drawn, chances = self._draw(keys)
        slot = 0
        if self.slots is None:
            crops = np.empty((len(keys), height, width, 3), np.uint8)
        else:
            _, epoch, position = keys[0]
            slot = (epoch * self.batches_per_epoch + position // self.config.recipe.batch_size) % len(self.slots)
            crops = self.slots[slot].numpy()
        skipped: dict[int, str] = {}
        indices = []
        shifts = zip(drawn.down.tolist(), np.where(drawn.mirrored, -drawn.right, drawn.right).tolist(), strict=True)
        for out, (first, _, _), (down, right) in zip(crops, keys, shifts, strict=True):
            try:
                index, crop = self._readable(first, height, width, skipped)
            except UserError as error:
                return error  # an exception of a worker would reach the user with the worker's traceback
            indices.append(index)
            shift_into(out, crop, down, right)
        cutouts = drawn.cutouts
        if self.occluder is not None:
            cutouts = self.occluder.cutouts(np.array(indices), drawn.mirrored, chances)
        return _WorkerBatch(
            crops if self.slots is None else slot,
            drawn.mirrored,
            cutouts,
            np.array([self.labels[index] for index in indices]),
            np.array(indices),
            skipped,
        )

    def _readable(self, first: int, height: int, width: int, skipped: dict[int, str]) -> tuple[int, Crops]:
        """The sample `first`, or with `skip_bad` the next of its identity that can be read."""
        index = first
        while True:
            try:
                return index, load_crop(self.samples[index].path, height, width)
            except UserError as error:
                if not self.skip_bad:
                    raise
                skipped[index] = str(error)
            same_identity = [other for other, label in enumerate(self.labels) if label == self.labels[first]]
            index = same_identity[(same_identity.index(index) + 1) % len(same_identity)]
            if index == first:
                problem = f"no image of identity {self.samples[first].pid} can be read ({skipped[first]})"
                raise InvalidFile(problem, path=self.samples[first].path.parent)

    def _draw(self, keys: list[tuple[int, int, int]]) -> tuple[Augmentation, npt.NDArray[np.float64]]:
        """The augmentation of `keys`, a share of one batch, from what is drawn for the whole batch, and then a number
        in 0..1 for each."""
        data, size = self.config.data, self.config.recipe.batch_size
        _, epoch, first = keys[0]
        rng = np.random.default_rng([self.config.seed, AUGMENT, epoch, first // size])
        whole = draw_augmentation(self.config.recipe, data.height, data.width, size, rng)
        chances = rng.random(size)
        share = [position % size for _, _, position in keys]
        own = Augmentation(whole.mirrored[share], whole.down[share], whole.right[share], whole.cutouts[share])
        return own, chances[share]


class TrainLoader:
    """The batches of the sampler's epochs, `TrainBatch`es or UserErrors in their place; `len` is those of one epoch.

    Workers load the first batches of the next epoch while one ends. The crops of a batch are valid until the next batch
    is requested: workers write crops to shared memory that is reused, because new pages take the kernel longer to
    provide than to fill, a quarter of the time of decoding.
    """

    def __init__(
        self,
        samples: tuple[Sample, ...],
        config: Config,
        *,
        device: torch.device = CPU,
        rank: int = 0,
        world: int = 1,
        skip_bad: bool = False,
        occluder: Occluder | None = None,
    ) -> None:
        workers, recipe = config.data.workers, config.recipe
        recipe.ids_per_part(world)
        shape = (recipe.batch_size // world, config.data.height, config.data.width, 3)
        self.slots = _shared(PREFETCH * workers + 1, shape) if workers else None
        self.ending = torch.zeros((), dtype=torch.bool).share_memory_()
        """Whether this process is about to end, and its workers with it."""
        if workers:
            atexit.register(
                self.ending.fill_, True
            )  # registered last, so called before multiprocessing ends the workers
        train_set = TrainSet(samples, config, self.slots, skip_bad=skip_bad, occluder=occluder)
        self.sampler = sampler_of(train_set.labels, recipe, config.seed, rank, world)
        self.skipped: dict[int, str] = {}
        """The samples that could not be read so far, index to reason."""
        self.loader: DataLoader[Any] = DataLoader(
            train_set,
            sampler=self.sampler,
            batch_size=None,  # an item of the set is a batch
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=partial(_start_worker, self.ending),
            persistent_workers=workers > 0,
            multiprocessing_context=_start_method(device, world) if workers else None,
            # else each start of the workers would advance the global generator, and change a resumed run
            generator=torch.Generator().manual_seed(config.seed),
        )
        self.pinned = device.type == "cuda"

    def __len__(self) -> int:
        return len(self.sampler)

    def close(self) -> None:
        """End the workers; a new iteration starts new ones.

        A loader that an error's traceback refers to is collected late, its queues before its workers: torch then waits
        10 s for each worker.
        """
        if (iterator := getattr(self.loader, "_iterator", None)) is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None

    def __iter__(self) -> Iterator[TrainBatch | UserError]:
        for batch in self.loader:
            if isinstance(batch, _WorkerBatch):
                self.skipped |= batch.skipped
                yield self._batch(batch)
            else:
                yield batch

    def _batch(self, batch: _WorkerBatch) -> TrainBatch:
        """Its crops are the slot itself, or a copy in pinned memory: a GPU may still read it when the next batch is
        requested. Until then no worker writes to the slot, because a request lets the workers begin the batch that is
        PREFETCH * workers later, and there is one slot more than that.
        """
        if isinstance(batch.crops, int):
            assert self.slots is not None
            crops = self.slots[batch.crops]
            if self.pinned:
                slot, crops = crops, torch.empty(crops.shape, dtype=crops.dtype, pin_memory=True)
                crops.numpy()[:] = slot.numpy()  # torch's threads would spin on the cores that the workers need
        else:
            crops = self._tensor(batch.crops)
        return TrainBatch(crops, *map(self._tensor, (batch.mirrored, batch.cutouts, batch.labels, batch.indices)))

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.pinned else tensor


def train_batches(
    samples: tuple[Sample, ...],
    config: Config,
    *,
    device: torch.device = CPU,
    rank: int = 0,
    world: int = 1,
    skip_bad: bool = False,
    occluder: Occluder | None = None,
) -> tuple[TrainLoader, EpochSampler]:
    """The loader of `TrainBatch`es (or UserErrors in their place) and its sampler, whose `epochs` the caller sets.

    Process `rank` of `world` gets its share of each batch, in page-locked memory for a GPU. An `occluder` draws windows
    of zeros in place of Cutout. Raises UserError for fewer identities than a batch needs, a batch that so many
    processes cannot share, or too little shared memory for the workers.
    """
    loader = TrainLoader(samples, config, device=device, rank=rank, world=world, skip_bad=skip_bad, occluder=occluder)
    return loader, loader.sampler


def _start_method(device: torch.device, world: int) -> str | None:
    """How workers start: None for a fork, or "forkserver", as from Python 3.14 on everywhere: NCCL does not survive a
    fork (torch's documentation of DistributedDataParallel), so its workers come from a process that never used it."""
    if (device.type != "cuda" or world == 1) and multiprocessing.get_start_method() != "forkserver":
        return None
    forkserver.set_forkserver_preload([__name__])
    # it starts with what is ignored here: a scheduler sends SIGTERM to it too, and its workers would end with it
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)
    return "forkserver"


def _shared(slots: int, shape: tuple[int, ...]) -> Tensor:
    """Shared memory uint8 [slots, *shape]."""
    try:
        return torch.empty((slots, *shape), dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        megabytes = slots * math.prod(shape) / 1e6
        problem = f"there is no shared memory of {megabytes:.0f} MB for the workers that load images"
        hint = "use fewer --workers (0: none), or with Docker a larger --shm-size"
        raise OutOfMemory(f"{problem} ({reason_of(error)})", hint=hint) from error


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(ending: Tensor, worker: int) -> None:
    # a terminal sends Ctrl-C to every process: a worker that it ends would look like one that died
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a scheduler sends SIGTERM to every process too: the run is saved first
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending else None)
    _keep_memory()


def _keep_memory() -> None:
    """Let glibc keep an image's memory for the next image: pages that the kernel gets back cost page faults again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the maximum
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
