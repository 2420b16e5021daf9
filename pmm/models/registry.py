"""The methods that can be trained, by name. Loads no torch until a model is built: command lines are checked before."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from pmm.config import Config
from pmm.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pmm.models.output import InferenceModel, TrainOutput


class ReidModel(Protocol):
    """What every method offers; see `pmm.models.multi_branch.MultiBranchNet` for shapes."""

    embedding_dim: int
    normalised: bool

    def forward(
        self, images: Tensor, pids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TrainOutput: ...

    def deployed(self) -> InferenceModel: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train. Sampler and recipe are the configuration's; how labels are mixed is in the model's output."""

    network: str
    """Module and class of the model."""
    reads: tuple[str, ...] = ()
    """The keys of the configuration that say how it mixes; other methods do not read them."""
    mixes_cells: bool = False
    """Does its mix run on the kernels of `pmm.ops`?"""

    @property
    def ranks_blocks(self) -> bool:
        """Does it mix the blocks of the map that a CAM ranks first?"""
        return "block" in self.reads

    def build(self, config: Config) -> nn.Module:
        """Its model, randomly initialised."""
        module, name = self.network.split(":")
        return getattr(importlib.import_module(module), name)(config.model)


_BLOCKS = ("block", "k", "on_empty")

METHODS: dict[str, Method] = {
    "pmm": Method(network="pmm.models.pmm:PMM", reads=_BLOCKS, mixes_cells=True),
    "baseline": Method(network="pmm.models.baseline:Baseline"),
    "bdb": Method(network="pmm.models.bdb:BDB"),
    "cutout-batch": Method(network="pmm.models.cutout:CutoutBatch"),
    "cutout-sample": Method(network="pmm.models.cutout:CutoutSample"),
    "cutmix": Method(network="pmm.models.cutmix:CutMix", mixes_cells=True),
    "a-cutmix": Method(network="pmm.models.a_cutmix:ACutMix", reads=(*_BLOCKS, "direction"), mixes_cells=True),
}
"""Name -> method. A new one is a class with the interface of `ReidModel` and a line here, and a word in the help of
`pmm.config`; `tests/models/test_methods.py` then tries it."""


def method_of(config: Config) -> Method:
    """The method of `config`. Raises UserError naming the known ones."""
    if config.model.method not in METHODS:
        raise UserError(f"unknown method '{config.model.method}'; known methods: {', '.join(METHODS)}")
    return METHODS[config.model.method]


def refuse_unread(config: Config, flags: Iterable[str]) -> None:
    """Raise UserError for an unknown method, and for a flag of a mix that the method of `config` never reads.

    `flags` as `pmm.utils.command_line.given_flags` returns them.
    """
    method = method_of(config)
    for flag in sorted(flags):
        key = flag.removeprefix("--").replace("-", "_")
        readers = [name for name, other in METHODS.items() if key in other.reads]
        if readers and key not in method.reads:
            raise UserError(
                f"{flag} says nothing to method {config.model.method}, only to {' and '.join(readers)}; "
                "leave it out, or choose another --method"
            )


def build_model(config: Config) -> nn.Module:
    """The model of `config`, randomly initialised (see `pmm.artifacts.pretrained.load_weights` for pretrained trunks).

    Raises UserError for an unknown method or, where it mixes blocks, blocks and k that do not fit the feature map.
    """
    method = method_of(config)
    if method.ranks_blocks:
        _check_mix_fits(config)
    return method.build(config)


def deployed(model: nn.Module) -> InferenceModel:
    """The model's test-time network for export, in eval mode; its weights are copies."""
    return cast("ReidModel", copy.deepcopy(model).cpu().eval()).deployed().eval()


def _check_mix_fits(config: Config) -> None:
    from pmm.models.backbone import STRIDE
    from pmm.ops.block_ranking import grid

    height, width = -(-config.data.height // STRIDE), -(-config.data.width // STRIDE)
    rows, columns = grid(height, width, config.model.block)
    if config.model.k > rows * columns:
        raise UserError(
            f"config: k is {config.model.k}, but the {height}x{width} map of {config.data.height}x{config.data.width} "
            f"crops has only {rows * columns} blocks of {config.model.block[0]}x{config.model.block[1]}"
        )
