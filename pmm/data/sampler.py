"""The order of training: P identities x K images a batch, each identity once an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from pmm.utils.errors import InvalidInput, InvalidValue

ORDER = 2  # a stream of the run's seed (1 holds out the validation identities, 3 augments, 4 draws the partners)


class PKSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of P identities x K images; each identity once per epoch, an incomplete last batch dropped.

    Yields lists of (sample index, epoch, position in the epoch): the share that process `rank` of `world` has of each
    batch, so that all processes together see the batches of a single one. The caller sets `epochs`, which follow each
    other without a break, and `first`, the batch of the first of them to begin with; the length is that of one epoch.
    Raises InvalidValue if there are fewer identities than P, InvalidInput for fewer than two.
    """

    def __init__(
        self, labels: Sequence[int], ids_per_batch: int, images_per_id: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.of_label: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(labels):
            self.of_label[label].append(index)
        self.ids_per_batch, self.images_per_id, self.seed = ids_per_batch, images_per_id, seed
        self.rank, self.world = rank, world
        self.epochs, self.first = range(1), 0
        if len(self.of_label) < ids_per_batch:
            if (count := len(self.of_label)) < 2:
                raise InvalidInput(f"the training split has {count} identities", expected="2 or more")
            expected = f"{count * images_per_id} or less, because the training split has {count} identities"
            raise InvalidValue("--batch-size", ids_per_batch * images_per_id, expected)

    def __len__(self) -> int:
        return len(self.of_label) // self.ids_per_batch

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for epoch in self.epochs:
            yield from self._batches(epoch, self.first if epoch == self.epochs[0] else 0)

    def _batches(self, epoch: int, begin: int) -> Iterator[list[tuple[int, int, int]]]:
        rng = np.random.default_rng([self.seed, ORDER, epoch])
        labels = rng.permutation(sorted(self.of_label))
        for batch in range(len(self)):
            chosen: list[int] = []
            for label in labels[batch * self.ids_per_batch : (batch + 1) * self.ids_per_batch]:
                indices = self.of_label[int(label)]
                picks = rng.choice(len(indices), self.images_per_id, replace=len(indices) < self.images_per_id)
                chosen += [indices[pick] for pick in picks]
            first, share = batch * len(chosen), len(chosen) // self.world
            keys = [(index, epoch, first + place) for place, index in enumerate(chosen)]
            if batch >= begin:
                yield keys[self.rank * share : (self.rank + 1) * share]
