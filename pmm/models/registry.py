"""The methods that can be trained, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from pmm.config import Config
from pmm.errors import UserError
from pmm.models.backbone import STRIDE
from pmm.models.bdb import BDB
from pmm.models.output import Deployed, TrainOutput
from pmm.models.pmm import PMM
from pmm.ops.block_ranking import grid


class ReidModel(Protocol):
    """What every method offers; see `pmm.models.two_maps.TwoMaps` for shapes."""

    embedding_dim: int

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput: ...

    def deployed(self) -> Deployed: ...


METHODS: dict[str, Callable[..., nn.Module]] = {"pmm": PMM, "bdb": BDB}


def build_model(config: Config) -> nn.Module:
    """The model of `config`, randomly initialised (see `pmm.models.backbone.load_weights` for pretrained trunks).

    Raises UserError for an unknown method or, for pmm, blocks and k that do not fit the feature map.
    """
    if config.model.method not in METHODS:
        raise UserError(f"unknown method '{config.model.method}'; known methods: {', '.join(METHODS)}")
    if config.model.method == "pmm":
        _check_mix_fits(config)
    return METHODS[config.model.method](config.model)


def deployed(model: nn.Module) -> Deployed:
    """The model's test-time network for export, in eval mode; its weights are copies."""
    return cast(ReidModel, copy.deepcopy(model).cpu().eval()).deployed().eval()


def _check_mix_fits(config: Config) -> None:
    height, width = -(-config.data.height // STRIDE), -(-config.data.width // STRIDE)
    rows, columns = grid(height, width, config.model.block)
    if config.model.k > rows * columns:
        raise UserError(
            f"config: k is {config.model.k}, but the {height}x{width} map of {config.data.height}x{config.data.width} "
            f"crops has only {rows * columns} blocks of {config.model.block[0]}x{config.model.block[1]}"
        )
