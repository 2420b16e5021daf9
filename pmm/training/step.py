"""One step of training, and the evaluation of a model in memory."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pmm.config import Config
from pmm.data.batches import TrainBatch, normalize_batch
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Crops, Preprocessing, preprocessing_of
from pmm.data.samples import ReidDataset
from pmm.evaluation.metrics import RankingResult
from pmm.gallery.embed import embed_crops
from pmm.gallery.ranking import rank_split
from pmm.runtime.base import Embeddings
from pmm.runtime.eager import EagerRunner
from pmm.training.distributed import SINGLE, Processes
from pmm.training.losses import reid_losses
from pmm.training.state import TrainState
from pmm.utils.errors import UserError

PARTNERS = 4  # a stream of the run's seed, see pmm.data.sampler
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def be_deterministic(device: torch.device) -> None:
    """On CUDA ask for deterministic algorithms: one seed, one machine, one result to the bit."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def train_step(
    trainee: TrainState,
    batch: TrainBatch,
    config: Config,
    device: torch.device,
    processes: Processes = SINGLE,
    *,
    epoch: int = 0,
    step: int = 0,
    found: Callable[[dict[str, Tensor]], object] = lambda losses: None,
) -> dict[str, Tensor]:
    """One step on this process's share of a batch: the losses by name and their sum as "loss", scalars on `device`.

    What is random in it is drawn from (seed, epoch, step, share), so that it does not depend on the steps before.
    `found` is given the losses as soon as they are known, before the (last) backward.
    """
    recipe, parts = config.recipe, config.recipe.accumulate
    images = normalize_batch(batch, preprocessing_of(config), device)
    labels = batch.labels.to(device, non_blocking=True)
    trainee.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for part, (some, pids) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
        _seed(config.seed, PARTNERS, epoch, step, processes.rank * parts + part)
        with trainee.unsynchronised() if part + 1 < parts else contextlib.nullcontext():
            with torch.autocast(device.type, HALF.get(recipe.amp), enabled=recipe.amp in HALF):
                output = trainee.network(some, pids)
            rows = processes.rows if recipe.gather else None
            losses = reid_losses(output, pids, label_smoothing=recipe.label_smoothing, rows=rows)
            losses["loss"] = torch.stack(list(losses.values())).sum()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / parts
            if part + 1 == parts:
                found(sums)
            trainee.scaler.scale(losses["loss"] / parts).backward()
    if recipe.clip_norm:
        trainee.scaler.unscale_(trainee.optimizer)
        nn.utils.clip_grad_norm_(trainee.model.parameters(), recipe.clip_norm)
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()
    with warnings.catch_warnings():  # a step that the scaler left out is none for the optimizer, but one in time
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        trainee.scheduler.step()
    return sums


def _seed(*stream: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def collapsed(losses: Mapping[str, float], num_classes: int) -> bool:
    """True if every stage's features are one point: triplet stuck at ln 2 and cross-entropy at ln K.

    The hardest positive of an anchor is at least as far as its hardest negative where they are all in one place, so
    what little is left of distances shows above ln 2.
    """
    triplets = [value for name, value in losses.items() if name.startswith("triplet")]
    entropies = [value for name, value in losses.items() if name.startswith("cross_entropy")]
    return all(-0.01 < value - math.log(2) < 0.05 for value in triplets) and all(
        value > 0.98 * math.log(num_classes) for value in entropies
    )


class Validation:
    """The held-out identities, decoded once; each process has its share of the crops."""

    def __init__(self, split: ReidDataset, preprocessing: Preprocessing, processes: Processes = SINGLE) -> None:
        self.split, self.preprocessing, self.processes = split, preprocessing, processes
        paths = [sample.path for sample in (*split.query, *split.gallery)]
        mine = paths[processes.rank :: processes.world]
        self.crops: Crops = load_crops(mine, preprocessing.height, preprocessing.width)

    def evaluate(self, model: nn.Module, device: torch.device) -> RankingResult | None:
        """Ranking metrics of `model` on the held-out identities; None in all processes but the first.

        Raises UserError in the first for embeddings that are not finite.
        """
        self.processes.align(model)
        runner = EagerRunner(model, self.preprocessing, device)
        mine = embed_crops(runner, self.crops) if len(self.crops) else np.empty((0, runner.embedding.dim), np.float32)
        shares = self.processes.gathered(mine)
        return self.processes.together(lambda: self._ranked(shares) if self.processes.main else None)

    def _ranked(self, shares: Sequence[Embeddings]) -> RankingResult:
        embeddings = np.empty((sum(map(len, shares)), shares[0].shape[1]), np.float32)
        for rank, share in enumerate(shares):
            embeddings[rank :: self.processes.world] = share
        if not np.isfinite(embeddings).all():
            raise UserError("validation: the embeddings hold NaN or Inf: start again with a lower --lr")
        queries = len(self.split.query)
        return rank_split(self.split, embeddings[:queries], embeddings[queries:])
