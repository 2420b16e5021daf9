"""The order of training: P identities x K images a batch, each identity once an epoch; or each image once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from pmm.recipe import RecipeConfig
from pmm.utils.errors import InvalidInput, InvalidValue

ORDER = 2  # a stream of the run's seed (1 holds out the validation identities, 3 augments, 4 draws the partners)


class EpochSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of epochs.

    Yields lists of (sample index, epoch, position in the epoch): the share that process `rank` of `world` has of each
    batch, so that all processes together see the batches of a single one. The caller sets `epochs`, which follow each
    other without a break, and `first`, the batch of the first of them to begin with; the length is that of one epoch.
    """

    def __init__(self, seed: int, rank: int, world: int) -> None:
        self.seed, self.rank, self.world = seed, rank, world
        self.epochs, self.first = range(1), 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for epoch in self.epochs:
            begin = self.first if epoch == self.epochs[0] else 0
            for batch, chosen in enumerate(self.batches(epoch, np.random.default_rng([self.seed, ORDER, epoch]))):
                first, share = batch * len(chosen), len(chosen) // self.world
                keys = [(index, epoch, first + place) for place, index in enumerate(chosen)]
                if batch >= begin:
                    yield keys[self.rank * share : (self.rank + 1) * share]

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """The sample indices of each batch of `epoch`, drawn with `rng`."""
        raise NotImplementedError


class ShuffleSampler(EpochSampler):
    """Batches of B images; each image once per epoch, an incomplete last batch dropped.

    Raises InvalidValue if there are fewer images than B.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(seed, rank, world)
        self.count, self.batch_size = count, batch_size
        if count < batch_size:
            raise InvalidValue("--batch-size", batch_size, f"{count} or less, the images of the training split")

    def __len__(self) -> int:
        return self.count // self.batch_size

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """Slices of one permutation."""
        order = rng.permutation(self.count).tolist()
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


class PKSampler(EpochSampler):
    """Batches of P identities x K images; each identity once per epoch, an incomplete last batch dropped.

    Raises InvalidValue if there are fewer identities than P, InvalidInput for fewer than two.
    """

    def __init__(
        self, labels: Sequence[int], ids_per_batch: int, images_per_id: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(seed, rank, world)
        self.of_label: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(labels):
            self.of_label[label].append(index)
        self.ids_per_batch, self.images_per_id = ids_per_batch, images_per_id
        if len(self.of_label) < ids_per_batch:
            if (count := len(self.of_label)) < 2:
                raise InvalidInput(f"the training split has {count} identities", expected="2 or more")
            expected = f"{count * images_per_id} or less, because the training split has {count} identities"
            raise InvalidValue("--batch-size", ids_per_batch * images_per_id, expected)

    def __len__(self) -> int:
        return len(self.of_label) // self.ids_per_batch

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """P identities of a permutation, K images of each."""
        labels = rng.permutation(sorted(self.of_label))
        for batch in range(len(self)):
            chosen: list[int] = []
            for label in labels[batch * self.ids_per_batch : (batch + 1) * self.ids_per_batch]:
                indices = self.of_label[int(label)]
                picks = rng.choice(len(indices), self.images_per_id, replace=len(indices) < self.images_per_id)
                chosen += [indices[pick] for pick in picks]
            yield chosen


def sampler_of(labels: Sequence[int], recipe: RecipeConfig, seed: int, rank: int = 0, world: int = 1) -> EpochSampler:
    """The sampler of the recipe for samples with these class indices. Raises as the samplers."""
    if recipe.sampler == "shuffle":
        return ShuffleSampler(len(labels), recipe.batch_size, seed, rank, world)
    return PKSampler(labels, recipe.ids_per_batch, recipe.images_per_id, seed, rank, world)
