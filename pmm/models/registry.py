"""The methods that can be trained, by name. Loads no torch until a model is built, so that flags are checked fast."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pmm.config import Config
from pmm.models.phases import Phase, aos_phases, rpp_phases, single_phase
from pmm.utils.errors import ConflictingOptions, InvalidValue

if TYPE_CHECKING:
    from torch import nn

    from pmm.models.output import EmbeddingModel, InferenceModel, ReidModel


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train: its network, which also says how labels are mixed. Its values of the configuration, where they
    are not those of all, are in `pmm.presets`."""

    network: str
    """Module and class of the model."""
    config_keys: tuple[str, ...] = ()
    """Keys of the configuration that only this and similar methods use."""
    uses_kernels: bool = False
    """Whether its mix runs on the kernels of `pmm.ops`."""
    triplet: bool = True
    """Whether a triplet loss is among its losses, which needs several images of an identity in a batch."""
    phases: Callable[[Config], tuple[Phase, ...]] = single_phase
    """The phases of its training."""
    starts_from: tuple[str, ...] = ()
    """Methods of the checkpoints that it can start from (default: all)."""
    head: str = "stage"
    """What each of its classifiers is called."""
    note: str = ""
    """Printed with its results."""

    @property
    def ranks_blocks(self) -> bool:
        """Whether it mixes the blocks of the map that a CAM ranks first."""
        return "block" in self.config_keys

    @property
    def model(self) -> type[ReidModel]:
        """Class of the model. Loads torch."""
        module, name = self.network.split(":")
        found: type[ReidModel] = getattr(importlib.import_module(module), name)
        return found


_HEADS = ("feature_dim", "neck", "metric", "gather")
"""Of methods with a triplet loss on the feature of each stage."""
_BLOCKS = (*_HEADS, "block", "k", "on_empty")
_PARTS = ("feature_dim", "parts", "reduction", "embedding", "dropout")

METHODS: dict[str, Method] = {
    "pmm": Method(network="pmm.models.pmm:PMM", config_keys=_BLOCKS, uses_kernels=True),
    "baseline": Method(network="pmm.models.baseline:Baseline", config_keys=_HEADS),
    "bdb": Method(network="pmm.models.drop_block:BDB", config_keys=_HEADS),
    "cutout-batch": Method(network="pmm.models.drop_block:CutoutBatch", config_keys=_HEADS),
    "cutout-sample": Method(network="pmm.models.drop_block:CutoutSample", config_keys=_HEADS),
    "cutmix": Method(network="pmm.models.cutmix:CutMix", config_keys=_HEADS, uses_kernels=True),
    "a-cutmix": Method(network="pmm.models.cutmix:ACutMix", config_keys=(*_BLOCKS, "direction"), uses_kernels=True),
    "pcb": Method(network="pmm.models.pcb:PCB", config_keys=_PARTS, triplet=False, head="part"),
    "pcb-rpp": Method(
        network="pmm.models.rpp:RPP",
        config_keys=(*_PARTS, "rpp_schedule"),
        triplet=False,
        phases=rpp_phases,
        head="part",
        starts_from=("pcb", "pcb-rpp"),
    ),
    "cama": Method(
        network="pmm.models.cama:CAMA",
        config_keys=("branches", "penalty"),
        triplet=False,
        head="branch",
        note="network, penalty and recipe of cama are our reading of a paper whose formulas were not at hand",
    ),
    "aos": Method(
        network="pmm.models.aos:AOS",
        config_keys=("neck", "dropout", "aos_pick", "aos_share", "aos_step"),
        triplet=False,
        phases=aos_phases,
        head="classifier",
    ),
}
"""Name -> method. A new one is a class derived from `pmm.models.output.ReidModel`, a line here, a word in the help of
`pmm.config`, its own values, if any, in `pmm.presets`; `tests/models/test_methods.py` then tries it."""


def method_of(config: Config) -> Method:
    """The method of `config`. Raises InvalidValue for an unknown one."""
    if config.model.method not in METHODS:
        raise InvalidValue("--method", config.model.method, choices=METHODS)
    return METHODS[config.model.method]


def method_note(name: str) -> str:
    """What to print with the results of the method; empty for most, and for a `name` that is no method's."""
    return METHODS[name].note if name in METHODS else ""


def check_method_flags(config: Config, flags: Iterable[str]) -> None:
    """Raises InvalidValue for an unknown method or fewer epochs than it has phases, ConflictingOptions for a flag that
    the method does not use.

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
    if method.triplet and config.recipe.sampler != "pk":
        problem = f"--sampler {config.recipe.sampler} does not put several images of each identity into a batch, which "
        problem += f"the triplet loss of --method {config.model.method} needs"
        raise ConflictingOptions(problem, "--sampler", "--method", hint="leave it out")
    phases_of(config)


def phases_of(config: Config) -> tuple[Phase, ...]:
    """The phases of its training. Raises InvalidValue for fewer epochs than phases."""
    return method_of(config).phases(config)


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
    return method_of(config).model(config.model)


def deployed(model: nn.Module) -> InferenceModel:
    """The model's test-time network for export, in eval mode; its weights are copies."""
    model = cast("EmbeddingModel", copy.deepcopy(model).cpu().eval())
    model.merge_branches()
    return model.deployed().eval()


def _check_mix_fits(config: Config, *, cut_blocks: bool = True) -> None:
    from pmm.models.backbone import map_size
    from pmm.ops.block_ranking import grid

    method, model, data = method_of(config), config.model, config.data
    height, width = map_size(model.backbone, data.height, data.width, model.last_stride)
    crops = f"{data.height}x{data.width}"
    method.model.check_map(model, height, width, crops)
    if not method.ranks_blocks:
        return
    block, k = model.block, model.k
    if k and (block[0] > height or block[1] > width) and not cut_blocks:
        expected = f"{height} {width} at most, the cells of the map of {crops} crops"
        raise InvalidValue("--block", "{} {}".format(*block), expected)
    rows, columns = grid(height, width, block)
    if k > rows * columns:
        expected = f"{rows * columns} at most, the number of {block[0]}x{block[1]} blocks on the {height}x{width} map"
        raise InvalidValue("--k", k, f"{expected} of {crops} crops")
