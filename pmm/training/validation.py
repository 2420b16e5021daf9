"""The evaluation of a model while it trains, on held-out identities or on the test split."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pmm.config import Config
from pmm.data.bad_images import naming_all
from pmm.data.crops import iter_crops, load_crops
from pmm.data.preprocessing import Preprocessing, Resize, preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.data.splits import without_unreadable
from pmm.embedding.embed import embed_crops, embed_files
from pmm.evaluation.metrics import RankingResult
from pmm.evaluation.ranking import rank_split
from pmm.runtime.base import Embeddings
from pmm.runtime.eager import EagerRunner
from pmm.training.distributed import SINGLE, Processes
from pmm.training.progress import warn
from pmm.utils.errors import InvalidFile, UserError

IN_MEMORY = 512 << 20
"""Bytes of crops that a process keeps decoded; more are read again in each evaluation."""


class Evaluations:
    """What is evaluated while a model trains: held-out identities, which choose the best model, and if the recipe asks
    for it the test split, which chooses nothing."""

    def __init__(
        self, config: Config, split: ReidDataset, processes: Processes = SINGLE, *, skip_bad: bool = False
    ) -> None:
        """`split` has the held-out identities. With `skip_bad` crops that cannot be read are left out.

        Raises UserError, as all processes together do, for a crop or a test split that cannot be read.
        """
        self.recipe, self.processes, self.skip_bad = config.recipe, processes, skip_bad
        self.preprocessing = preprocessing_of(config)
        self.held_out, self.test = self._validation(split, "held-out"), None
        if self.recipe.eval_every:
            data = processes.run_on_all(lambda: read_dataset(config.data.dataset, Path(config.data.root)))
            self.test = self._validation(dataclasses.replace(data, train=()), "test")

    @property
    def chooses(self) -> bool:
        """Whether there are held-out identities."""
        return self.held_out is not None

    def after(self, epoch: int, model: nn.Module, device: torch.device) -> dict[str, float]:
        """What the record of `epoch`, from 1, gets: val_mAP and val_rank1 where the held-out identities are evaluated,
        test_mAP and test_rank1 where the test split is. Empty in all processes but the first."""
        recipe, found = self.recipe, dict[str, float]()
        parts = ("val", self.held_out, recipe.val_every), ("test", self.test, recipe.eval_every)
        for name, validation, every in parts:
            if validation and (epoch % every == 0 or epoch == recipe.epochs):
                result = validation.evaluate(model, device)
                found |= {f"{name}_mAP": result.mAP, f"{name}_rank1": result.rank1} if result else {}
        return found

    def _validation(self, split: ReidDataset, name: str) -> Validation | None:
        """None without queries."""
        if self.skip_bad:
            split, bad = without_unreadable(split)
            if bad and self.processes.main:
                warn(f"{len(bad)} {name} images skipped; {'; '.join(bad[:3])}")
        if not split.query:
            return None
        size, processes = self.preprocessing, self.processes
        return processes.run_on_all(lambda: Validation(split, size, processes, name=name))


class Validation:
    """Queries and gallery of a split; each process embeds its share of the crops."""

    def __init__(
        self, split: ReidDataset, preprocessing: Preprocessing, processes: Processes = SINGLE, *, name: str = "held-out"
    ) -> None:
        """`name` is what messages call the crops. Raises InvalidFile for crops that cannot be read, all
        of them, now and not after hours of training."""
        self.split, self.preprocessing, self.processes, self.name = split, preprocessing, processes, name
        paths = [sample.path for sample in (*split.query, *split.gallery)]
        self.files = paths[processes.rank :: processes.world]
        size = preprocessing.height * preprocessing.width * 3
        self.crops = None
        try:
            if len(self.files) * size <= IN_MEMORY:
                none = np.empty(
                    (0, preprocessing.height, preprocessing.width, 3), np.uint8
                )  # more processes than crops
                self.crops = load_crops(self.files, preprocessing) if self.files else none
            else:
                deque(iter_crops(self.files, Resize(height=1, width=1), batch_size=64), maxlen=0)
        except InvalidFile as error:
            raise naming_all(error, paths) from error

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
