"""One epoch of training, the learning rate, and the evaluation of a model in memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pmm.config import Config, RecipeConfig
from pmm.data.crops import Crops, Preprocessing, load_crops, preprocessing_of
from pmm.data.loader import to_images
from pmm.data.samples import Split
from pmm.embed import embed_crops, rank_split
from pmm.errors import UserError
from pmm.losses import reid_losses
from pmm.metrics import RankingResult
from pmm.runtime.eager import EagerRunner

PAPER_EPOCHS = 400
MOST_WAITING = 1 / 3
"""Share of an epoch that may go in waiting for data before a run warns of it."""


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seed torch, and on CUDA ask for deterministic algorithms: one seed, one machine, one result to the bit."""
    torch.manual_seed(seed)
    if device is not None and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def learning_rate(recipe: RecipeConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of iteration `step` (from 0).

    "paper": the steps of the published recipe by epoch e = 1..400, stretched to `recipe.epochs`: 1e-4 (e // 5 + 1)
    below 50, then 1e-3, 1e-4 from 200, 1e-5 from 300 (times recipe.lr / 1e-3). "flat-cosine": linear warm-up, flat,
    half a cosine down.
    """
    if recipe.schedule == "paper":
        epoch = (step // steps_per_epoch) * PAPER_EPOCHS // recipe.epochs + 1
        if epoch < 50:
            return recipe.lr / 10 * (epoch // 5 + 1)
        return recipe.lr * (1 if epoch < 200 else 0.1 if epoch < 300 else 0.01)
    done = (step + 1) / (recipe.epochs * steps_per_epoch)
    if done < recipe.warmup:
        return recipe.lr * done / recipe.warmup
    if done <= recipe.flat:
        return recipe.lr
    return recipe.lr * (1 + math.cos(math.pi * (done - recipe.flat) / (1 - recipe.flat))) / 2


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
    device: torch.device,
    label: str,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One pass over `batches` of `TrainBatch`; `pause` is called before each step and may raise to stop there.

    Returns the mean of each loss, `loss` (their sum), `lr` (the last), `seconds`, those of them in which `device`
    waited for data (`data_seconds`) and the others (`step_seconds`), and `images_per_s`.
    Raises UserError for a bad image (naming it) or a loss that is not finite.
    """
    model.train()
    preprocessing = preprocessing_of(config)
    totals: dict[str, torch.Tensor] = {}
    images_seen, steps, data_seconds = 0, 0, 0.0
    begin = waiting = time.perf_counter()
    stepped: torch.cuda.Event | None = None
    bar = tqdm(batches, desc=label, unit="batch", leave=False, disable=None)
    for batch in bar:
        if stepped is None or stepped.query():  # else a GPU is still at the step before, and this wait costs nothing
            data_seconds += time.perf_counter() - waiting
        pause()
        if isinstance(batch, UserError):
            raise batch
        images = to_images(batch, preprocessing, device)
        labels = batch.labels.to(device, non_blocking=True)
        losses = reid_losses(model(images, labels), labels, label_smoothing=config.recipe.label_smoothing)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        for name, value in {**losses, "loss": loss}.items():
            totals[name] = totals.get(name, 0) + value.detach()
        images_seen, steps = images_seen + len(images), steps + 1
        if device.type == "cuda":
            stepped = torch.cuda.Event()
            stepped.record(torch.cuda.current_stream(device))
        waiting = time.perf_counter()
    means = {name: float(total) / steps for name, total in totals.items()}
    if not math.isfinite(means["loss"]):
        raise UserError(
            f"{label}: the loss is {means['loss']} (lr {lr:.2g}); lower --lr or lengthen --warmup, then start again; "
            "the last checkpoint is from before this epoch"
        )
    seconds = time.perf_counter() - begin
    spent = {"seconds": seconds, "data_seconds": data_seconds, "step_seconds": seconds - data_seconds}
    return means | {"lr": lr, **spent, "images_per_s": images_seen / seconds}


def advice_on_data(record: Mapping[str, float], workers: int, cores: int) -> str:
    """What to do if more than a third of an epoch went in waiting for data, in one line; empty if not.

    `record` is what `train_one_epoch` returned; `workers` load on a machine of `cores`.
    """
    waited = record["data_seconds"] / record["seconds"]
    if waited <= MOST_WAITING:
        return ""
    if workers < cores:
        return f"{waited:.0%} of the epoch was waiting for images: start runs with --workers {cores}, one for each core"
    return (
        f"{waited:.0%} of the epoch was waiting for images, though --workers {workers} keeps all {cores} cores busy: "
        "more cores or a faster disk would help"
    )


def collapsed(losses: dict[str, float], num_classes: int) -> bool:
    """True if every stage's features are one point: triplet stuck at ln 2 and cross-entropy at ln K."""
    triplets = [value for name, value in losses.items() if name.startswith("triplet")]
    entropies = [value for name, value in losses.items() if name.startswith("cross_entropy")]
    return all(abs(value - math.log(2)) < 0.01 for value in triplets) and all(
        value > 0.98 * math.log(num_classes) for value in entropies
    )


class Validation:
    """The held-out identities, decoded once."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split, self.preprocessing = split, preprocessing
        paths = [sample.path for sample in (*split.query, *split.gallery)]
        self.crops: Crops = load_crops(paths, preprocessing.height, preprocessing.width)

    def evaluate(self, model: nn.Module, device: torch.device) -> RankingResult:
        """Ranking metrics of `model` on the held-out identities."""
        embeddings = embed_crops(EagerRunner(model, self.preprocessing, device), self.crops)
        if not np.isfinite(embeddings).all():
            raise UserError("validation: the embeddings hold NaN or Inf; lower --lr or lengthen --warmup")
        queries = len(self.split.query)
        return rank_split(self.split, embeddings[:queries], embeddings[queries:])
