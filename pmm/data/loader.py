"""Training batches: the P x K sampler, the augmentation and the loader.

Every random choice comes from a generator seeded by (seed, epoch, position), so that the batches of an epoch do not
depend on the number of workers nor on the epochs before it: a resumed run sees what the uninterrupted one would have.
"""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pmm.config import Config, RecipeConfig
from pmm.data.crops import Preprocessing, load_crop, preprocessing_of
from pmm.data.samples import Sample, class_indices
from pmm.errors import UserError

ORDER, AUGMENT = 2, 3  # streams of the run's seed (1 holds out the validation identities)


class TrainBatch(NamedTuple):
    """images float32 [B, 3, H, W], normalised and augmented; labels int64 [B] (class indices); camids int64 [B]."""

    images: Tensor
    labels: Tensor
    camids: Tensor


class PKSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of P identities x K images; each identity once per epoch, an incomplete last batch dropped.

    Yields lists of (sample index, epoch, position in the epoch). Raises UserError if there are fewer identities than P.
    """

    def __init__(self, labels: Sequence[int], ids_per_batch: int, images_per_id: int, seed: int) -> None:
        self.of_label: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(labels):
            self.of_label[label].append(index)
        self.ids_per_batch, self.images_per_id, self.seed = ids_per_batch, images_per_id, seed
        self.epoch = 0
        if len(self.of_label) < ids_per_batch:
            found = len(self.of_label)
            advice = f"use --batch-size {found * images_per_id} or less" if found > 1 else "training needs at least two"
            raise UserError(f"a batch needs {ids_per_batch} identities, but the training split has {found}; {advice}")

    def __len__(self) -> int:
        return len(self.of_label) // self.ids_per_batch

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        rng = np.random.default_rng([self.seed, ORDER, self.epoch])
        labels = rng.permutation(sorted(self.of_label))
        for batch in range(len(self)):
            chosen: list[int] = []
            for label in labels[batch * self.ids_per_batch : (batch + 1) * self.ids_per_batch]:
                own = self.of_label[int(label)]
                picks = rng.choice(len(own), self.images_per_id, replace=len(own) < self.images_per_id)
                chosen += [own[pick] for pick in picks]
            first = batch * len(chosen)
            yield [(index, self.epoch, first + place) for place, index in enumerate(chosen)]


def augment(
    crop: npt.NDArray[np.uint8], recipe: RecipeConfig, preprocessing: Preprocessing, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """uint8 crop [H, W, 3] -> float32 [3, H, W]: random flip and shift, normalisation, Cutout with zeros."""
    if rng.random() < recipe.flip:
        crop = crop[:, ::-1]
    if recipe.shift:
        down, right = rng.integers(0, 2 * recipe.shift + 1, size=2)
        border = ((recipe.shift, recipe.shift), (recipe.shift, recipe.shift), (0, 0))
        crop = np.pad(crop, border, mode="edge")[down : down + crop.shape[0], right : right + crop.shape[1]]
    image = preprocessing.normalise(crop[None])[0]
    if rng.random() < recipe.cutout:
        height, width = (min(size, side) for size, side in zip(recipe.cutout_size, image.shape[1:], strict=True))
        top, left = rng.integers(0, [image.shape[1] - height + 1, image.shape[2] - width + 1])
        image[:, top : top + height, left : left + width] = 0
    return image


class TrainSet(Dataset[Any]):
    """Augmented training crops by (sample index, epoch, position); a bad file is returned as its error, not raised."""

    def __init__(self, samples: tuple[Sample, ...], config: Config) -> None:
        self.samples, self.config = samples, config
        self.preprocessing = preprocessing_of(config)
        labels = class_indices(samples)
        self.labels = [labels[sample.pid] for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        index, epoch, position = key
        sample = self.samples[index]
        try:
            crop = load_crop(sample.path, self.preprocessing.height, self.preprocessing.width)
        except UserError as error:
            return error  # a worker's exception would reach the user with the worker's traceback around it
        rng = np.random.default_rng([self.config.seed, AUGMENT, epoch, position])
        return augment(crop, self.config.recipe, self.preprocessing, rng), self.labels[index], sample.camid


def train_batches(samples: tuple[Sample, ...], config: Config) -> tuple[DataLoader[Any], PKSampler]:
    """The loader of `TrainBatch`es (or UserErrors in their place) and its sampler, whose `epoch` the caller sets."""
    train_set = TrainSet(samples, config)
    recipe = config.recipe
    sampler = PKSampler(train_set.labels, recipe.ids_per_batch, recipe.images_per_id, config.seed)
    loader: DataLoader[Any] = DataLoader(
        train_set,
        batch_sampler=sampler,
        num_workers=config.data.workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_parent,
        persistent_workers=config.data.workers > 0,
        # its own: else each start of the workers would move the global generator, and a resumed run with it
        generator=torch.Generator().manual_seed(config.seed),
    )
    return loader, sampler


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """A terminal sends Ctrl-C to every process: a worker that stopped by itself would look like one that died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(items: list[Any]) -> TrainBatch | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    images, labels, camids = zip(*items, strict=True)
    return TrainBatch(torch.from_numpy(np.stack(images)), torch.tensor(labels), torch.tensor(camids))
