"""The evaluation of a model while it trains, on held-out identities or on the test split."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pmm.data.crops import iter_crops, load_crops
from pmm.data.preprocessing import Preprocessing
from pmm.data.samples import ReidDataset
from pmm.evaluation.metrics import RankingResult
from pmm.gallery.embed import embed_crops, embed_files
from pmm.gallery.ranking import rank_split
from pmm.runtime.base import Embeddings
from pmm.runtime.eager import EagerRunner
from pmm.training.distributed import SINGLE, Processes
from pmm.utils.errors import UserError

IN_MEMORY = 512 << 20
"""Bytes of crops that a process keeps decoded; more are read again in each evaluation."""


class Validation:
    """Queries and gallery of a split; each process embeds its share of the crops."""

    def __init__(
        self, split: ReidDataset, preprocessing: Preprocessing, processes: Processes = SINGLE, *, name: str = "held-out"
    ) -> None:
        """`name` is what messages call the crops. Raises InvalidFile for a crop that cannot be read, now
        and not after hours of training."""
        self.split, self.preprocessing, self.processes, self.name = split, preprocessing, processes, name
        paths = [sample.path for sample in (*split.query, *split.gallery)]
        self.files = paths[processes.rank :: processes.world]
        size = preprocessing.height * preprocessing.width * 3
        self.crops = None
        if len(self.files) * size <= IN_MEMORY:
            none = np.empty((0, preprocessing.height, preprocessing.width, 3), np.uint8)  # more processes than crops
            self.crops = load_crops(self.files, preprocessing) if self.files else none
        else:
            deque(iter_crops(self.files, 1, 1, batch_size=64), maxlen=0)

    def evaluate(self, model: nn.Module, device: torch.device) -> RankingResult | None:
        """Ranking metrics of `model` on the split; None in all processes but the first.

        Draws no random numbers, and leaves `model` in eval mode. Raises UserError in the first process for embeddings
        that are not finite.
        """
        self.processes.broadcast_buffers(model)
        runner = EagerRunner(model, self.preprocessing, device)
        share = embed_files(runner, self.files) if self.crops is None else embed_crops(runner, self.crops)
        shares = self.processes.gather(share)
        return self.processes.run_on_all(lambda: self._rank(shares) if self.processes.main else None)

    def _rank(self, shares: Sequence[Embeddings]) -> RankingResult:
        embeddings = np.empty((sum(map(len, shares)), shares[0].shape[1]), np.float32)
        for rank, share in enumerate(shares):
            embeddings[rank :: self.processes.world] = share
        if not np.isfinite(embeddings).all():
            raise UserError(
                f"the embeddings of the {self.name} crops contain NaN or Inf", hint="start again with a lower --lr"
            )
        queries = len(self.split.query)
        return rank_split(self.split, embeddings[:queries], embeddings[queries:])
