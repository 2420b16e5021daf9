"""The methods that can be trained, by name. Loads no torch until a model is built, so that flags are checked fast."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pmm.config import Config
from pmm.utils.errors import ConflictingOptions, InvalidValue

if TYPE_CHECKING:
    from torch import nn

    from pmm.models.output import EmbeddingModel, InferenceModel, ReidModel


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train: its network, which also says how labels are mixed; sampler and recipe are the same for all."""

    network: str
    """Module and class of the model."""
    config_keys: tuple[str, ...] = ()
    """Keys of the configuration that only this and similar methods use."""
    uses_kernels: bool = False
    """Whether its mix runs on the kernels of `pmm.ops`."""

    @property
    def ranks_blocks(self) -> bool:
        """Whether it mixes the blocks of the map that a CAM ranks first."""
        return "block" in self.config_keys

    def build(self, config: Config) -> ReidModel:
        """Its model, randomly initialised."""
        module, name = self.network.split(":")
        return getattr(importlib.import_module(module), name)(config.model)


_BLOCKS = ("block", "k", "on_empty")

METHODS: dict[str, Method] = {
    "pmm": Method(network="pmm.models.pmm:PMM", config_keys=_BLOCKS, uses_kernels=True),
    "baseline": Method(network="pmm.models.baseline:Baseline"),
    "bdb": Method(network="pmm.models.drop_block:BDB"),
    "cutout-batch": Method(network="pmm.models.drop_block:CutoutBatch"),
    "cutout-sample": Method(network="pmm.models.drop_block:CutoutSample"),
    "cutmix": Method(network="pmm.models.cutmix:CutMix", uses_kernels=True),
    "a-cutmix": Method(network="pmm.models.cutmix:ACutMix", config_keys=(*_BLOCKS, "direction"), uses_kernels=True),
}
"""Name -> method. A new one is a class derived from `pmm.models.output.ReidModel`, a line here, a word in the help of
`pmm.config`; `tests/models/test_methods.py` then tries it."""


def method_of(config: Config) -> Method:
    """The method of `config`. Raises InvalidValue for an unknown one."""
    if config.model.method not in METHODS:
        raise InvalidValue("--method", config.model.method, choices=METHODS)
    return METHODS[config.model.method]


def check_method_flags(config: Config, flags: Iterable[str]) -> None:
    """Raises InvalidValue for an unknown method, ConflictingOptions for a flag that the method does not use.

    `flags` as `pmm.utils.command_line.flags_in` returns them.
    """
    method = method_of(config)
    for flag in sorted(flags):
        key = flag.removeprefix("--").replace("-", "_")
        users = [name for name, other in METHODS.items() if key in other.config_keys]
        if users and key not in method.config_keys:
            problem = f"{flag} would change nothing with --method {config.model.method}"
            hint = f"leave it out, or use --method {' or '.join(users)}"
            raise ConflictingOptions(problem, flag, "--method", hint=hint)


def check_network(config: Config) -> None:
    """As `build_model`, before a training; also raises InvalidValue for blocks larger than the feature map, which are
    cut to it.

    Loads torch.
    """
    _check_mix_fits(config, cut_blocks=False)


def build_model(config: Config) -> ReidModel:
    """The model of `config`, randomly initialised (see `pmm.artifacts.initial_weights` for others).

    Raises InvalidValue for an unknown method, a network of timm that is no backbone, crops that the backbone cannot
    take, or a k larger than the number of blocks of the feature map; MissingLibrary for a backbone of timm without it.
    """
    _check_mix_fits(config)
    return method_of(config).build(config)


def deployed(model: nn.Module) -> InferenceModel:
    """The model's test-time network for export, in eval mode; its weights are copies."""
    model = cast("EmbeddingModel", copy.deepcopy(model).cpu().eval())
    model.merge_branches()
    return model.deployed().eval()


def _check_mix_fits(config: Config, *, cut_blocks: bool = True) -> None:
    from pmm.models.backbone import map_size
    from pmm.ops.block_ranking import grid

    method, block, k = method_of(config), config.model.block, config.model.k
    height, width = map_size(config.model.backbone, config.data.height, config.data.width)
    if not method.ranks_blocks:
        return
    crops = f"{config.data.height}x{config.data.width}"
    if k and (block[0] > height or block[1] > width) and not cut_blocks:
        expected = f"{height} {width} at most, the cells of the map of {crops} crops"
        raise InvalidValue("--block", "{} {}".format(*block), expected)
    rows, columns = grid(height, width, block)
    if k > rows * columns:
        expected = f"{rows * columns} at most, the number of {block[0]}x{block[1]} blocks on the {height}x{width} map"
        raise InvalidValue("--k", k, f"{expected} of {crops} crops")
