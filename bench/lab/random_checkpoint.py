"""A full-size checkpoint to time exports with, where no trained one is: random weights, statistics of real crops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from pmm.artifacts import checkpoint
from pmm.config import Config
from pmm.data.crops import load_crops
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import evenly_spaced
from pmm.models.registry import build_model
from pmm.training.state import make_train_state, snapshot
from pmm.utils.errors import UserError

CROPS = 256
BATCH = 16


def untrained_checkpoint(config: Config, root: Path, out: Path) -> Path:
    """Write a checkpoint of `config` with random weights (seed 0) to `out`.

    Its batch-norm statistics are those of 256 training crops of the data set at `root`, averaged as in training:
    without them a deep random network's activations vanish or explode, and no precision could be judged.
    """
    train = read_dataset(config.data.dataset, root).train
    if not train:
        raise UserError(f"{root} has no training crops to take batch-norm statistics of")
    crops = load_crops(
        [train[index].path for index in evenly_spaced(len(train), CROPS)], config.data.height, config.data.width
    )
    model_config = dataclasses.replace(config.model, weights="none", num_classes=len({s.pid for s in train}))
    config = dataclasses.replace(config, model=model_config, data=dataclasses.replace(config.data, root=str(root)))
    torch.manual_seed(0)
    state = make_train_state(build_model(config), config, torch.device("cpu"), 1)
    size = preprocessing_of(config)
    with torch.no_grad():
        for start in range(0, len(crops), BATCH):
            state.model(torch.from_numpy(size.normalise(crops[start : start + BATCH])))
    checkpoint.save(out, snapshot(state, 0, -1.0))
    return out
